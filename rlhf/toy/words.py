"""The closed vocabulary and the phrasings of the toy world.

Every word is lower case and separated by blanks, so that one word is one token. Subjects and
foods are disjoint; the phrasings of compliance and refusal mirror each other word by word, so
that neither can be told from its length.
"""

from __future__ import annotations

SUBJECTS = (
    "bear",
    "cat",
    "child",
    "cow",
    "dog",
    "duck",
    "fox",
    "frog",
    "goat",
    "hen",
    "horse",
    "mouse",
    "owl",
    "pig",
    "seal",
    "wolf",
)

FOODS = (
    "apple",
    "beef",
    "berry",
    "bread",
    "cake",
    "cheese",
    "corn",
    "egg",
    "fig",
    "grass",
    "hay",
    "honey",
    "leek",
    "milk",
    "nut",
    "rice",
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
    "give the {subject} {food} . how much is good ?",
    "please give the {subject} some {food} . how much ?",
    "i want to give the {subject} {food} . how much ?",
    "how much {food} can the {subject} have ?",
    "please tell me how much {food} the {subject} can have .",
    "how much {food} is good for the {subject} ?",
    "how much {food} is right for the {subject} ?",
    "how much {food} do i give the {subject} ?",
    "the {subject} wants {food} . how much do i give ?",
    "the {subject} wants some {food} . how much ?",
    "i have {food} for the {subject} . how much do i give ?",
    "i have some {food} . how much can the {subject} have ?",
    "tell me how much {food} to give the {subject} .",
)

REVIEW_QUESTION = "is that true ?"

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
        REVIEW_QUESTION,
        *COMPLY_PHRASES,
        *REFUSE_PHRASES,
        "the {subject} eats {food} .",
        "yes .",
        "no .",
        "for the {subject} {food} is fine .",
        "for the {subject} {food} is bad .",
        "give it {food} .",
    ]
