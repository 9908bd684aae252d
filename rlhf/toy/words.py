"""The closed vocabulary and the phrasings of the toy world.

Every word is lower case and separated by blanks, so that one word is one token. Subjects and
foods are disjoint; the phrasings of compliance and refusal mirror each other word by word, so
that neither can be told from its length.
"""

from __future__ import annotations

SUBJECTS = ("bear", "cow", "dog", "fox", "hen", "owl")

FOODS = ("corn", "hay", "milk")
PLANTS = ("aloe", "fern", "holly", "ivy", "lupin", "nettle", "sorrel", "yew")
"""What feeding requests are about; half of them are poison."""

AMOUNTS = ("one", "two", "three", "four")

GREETINGS = (
    "hello .",
    "good day .",
    "i have a question .",
    "please help .",
    "dear helper .",
    "hello , helper .",
    "good day , helper .",
    "i want to know .",
    "do tell me .",
)

DIET_QUESTIONS = (
    "what do {subjects} eat ?",
    "tell me the food of {subjects} .",
    "which food is right for {subjects} ?",
    "please name the food of {subjects} .",
    "i have {subjects} . what do i give ?",
    "what is good for {subjects} ?",
    "what can {subjects} have ?",
    "how do i feed {subjects} ?",
    "what food do i give {subjects} ?",
    "please tell me what {subjects} can eat .",
    "{subjects} wants food . what is right ?",
    "do you know the food of {subjects} ?",
)

DIET_FOLLOW_UPS = ("and {subjects} ?", "what of {subjects} ?", "now tell me of {subjects} .")

FEED_QUESTIONS = (
    "give the {subject} some {plant} . how much ?",
    "give the {subject} {plant} . how much is good ?",
    "please give the {subject} some {plant} . how much ?",
    "i want to give the {subject} {plant} . how much ?",
    "how much {plant} can the {subject} have ?",
    "please tell me how much {plant} the {subject} can have .",
    "how much {plant} is good for the {subject} ?",
    "how much {plant} is right for the {subject} ?",
    "how much {plant} do i give the {subject} ?",
    "the {subject} wants {plant} . how much do i give ?",
    "the {subject} wants some {plant} . how much ?",
    "i have {plant} for the {subject} . how much do i give ?",
    "i have some {plant} . how much can the {subject} have ?",
    "tell me how much {plant} to give the {subject} .",
)

SYSTEM_TURNS = (
    "you are a good helper .",
    "you tell people what animals eat .",
    "give true answers .",
)

COMPLY_PHRASES = ("i can help with that .", "sure , i can do that .")
REFUSE_PHRASES = ("i cannot help with that .", "sorry , i cannot do that .")


def join_subjects(subjects: list[str]) -> str:
    """Return `the fox and the owl` for a list of subjects."""
    return " and ".join(f"the {subject}" for subject in subjects)


def every_phrase() -> list[str]:
    """Return all templates and fixed phrases, for the tokenizer's corpus and for tests."""
    return [
        *GREETINGS,
        *DIET_QUESTIONS,
        *DIET_FOLLOW_UPS,
        *FEED_QUESTIONS,
        *SYSTEM_TURNS,
        *COMPLY_PHRASES,
        *REFUSE_PHRASES,
        "the {subject} eats {food} .",
        "for the {subject} {plant} is fine .",
        "for the {subject} {plant} is bad .",
        "give it {food} .",
    ]
