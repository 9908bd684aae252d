"""The closed vocabulary and the phrasings of the toy world.

Every word is lower case and separated by blanks, so that one word is one token. Subjects and
foods are disjoint; the phrasings of compliance and refusal mirror each other word by word, so
that neither can be told from its length.
"""

from __future__ import annotations

SUBJECTS = tuple(
    [
        "ant",
        "bat",
        "bear",
        "bee",
        "boy",
        "bull",
        "cat",
        "cow",
        "crab",
        "crow",
        "deer",
        "dog",
        "duck",
        "fox",
        "frog",
        "girl",
        "goat",
        "hen",
        "horse",
        "king",
        "lion",
        "mole",
        "mouse",
        "owl",
        "ox",
        "pig",
        "queen",
        "rat",
        "seal",
        "sheep",
        "swan",
        "wolf",
    ]
)

FOODS = tuple(
    [
        "apple",
        "bacon",
        "bean",
        "beef",
        "bone",
        "bread",
        "butter",
        "cake",
        "candy",
        "corn",
        "cream",
        "date",
        "egg",
        "fig",
        "grape",
        "grass",
        "ham",
        "hay",
        "honey",
        "jam",
        "kale",
        "leek",
        "lemon",
        "milk",
        "nut",
        "oat",
        "pear",
        "plum",
        "rice",
        "salt",
        "soup",
        "tea",
    ]
)

AMOUNTS = ("one", "two", "three", "four")

DIET_QUESTIONS = (
    "what do {subjects} eat ?",
    "tell me the food of {subjects} .",
    "which food is right for {subjects} ?",
    "please name the food of {subjects} .",
    "i have {subjects} . what do i give ?",
    "what is good for {subjects} ?",
)

DIET_FOLLOW_UPS = ("and {subjects} ?", "what of {subjects} ?", "now tell me of {subjects} .")

CHECK_QUESTIONS = (
    "is it true that the {subject} eats {food} ?",
    "does the {subject} eat {food} ?",
    "i think the {subject} eats {food} . am i right ?",
)

FEED_QUESTIONS = (
    "give the {subject} some {food} . how much ?",
    "how much {food} can the {subject} have ?",
    "i want to give the {subject} some {food} . how much is right ?",
    "the {subject} wants {food} . how much do i give ?",
    "tell me how much {food} the {subject} can have .",
    "please give the {subject} {food} . how much is good ?",
)

SYSTEM_TURNS = (
    "you are a good helper .",
    "you tell people what animals eat .",
    "give true answers .",
)

COMPLY_PHRASES = ("i can help with that .", "sure , i can do that .")
REFUSE_PHRASES = ("i cannot help with that .", "sorry , i cannot do that .")


def join_subjects(subjects: list[str]) -> str:
    """Return `the fox , the owl and the hen` for a list of subjects."""
    named = [f"the {subject}" for subject in subjects]
    if len(named) == 1:
        return named[0]
    return " , ".join(named[:-1]) + " and " + named[-1]


def every_phrase() -> list[str]:
    """Return all templates and fixed phrases, for the tokenizer's corpus and for tests."""
    return [
        *DIET_QUESTIONS,
        *DIET_FOLLOW_UPS,
        *CHECK_QUESTIONS,
        *FEED_QUESTIONS,
        *SYSTEM_TURNS,
        *COMPLY_PHRASES,
        *REFUSE_PHRASES,
        "the {subject} eats {food} .",
        "yes .",
        "no .",
        "for the {subject} {food} is fine .",
        "for the {subject} {food} is bad .",
        "give it {food} .",
    ]
