"""Answers that are right or wrong: exact match, option letters, yes and no.

Each rule is the one that published figures of its benchmark were made with, named beside it; they
differ in what they forgive, so they are not merged into one.
"""

import re

_LETTERS = ("A", "B", "C", "D", "E")
# The last point is any character in LLaVA's expression too, so "The answer is B, since" names B.
_ANSWER_IS = re.compile(r"The answer is ([A-Z]).")


def normalize_answer(text: str) -> str:
    """Strips the ends, one final full stop, doubled spaces and letter case.

    Args:
        text: An answer, the model's or the true one.
    """
    return " ".join(text.split()).removesuffix(".").rstrip().casefold()


def exact_match(prediction: str, answer: str) -> bool:
    """Whether two answers are the same text after `normalize_answer`."""
    return normalize_answer(prediction) == normalize_answer(answer)


def gqa_answer(prediction: str) -> str:
    """An answer as LLaVA converts it for GQA: final full stops and case go, nothing else does."""
    return prediction.strip().rstrip(".").lower()


def gqa_match(prediction: str, answer: str) -> bool:
    """GQA's comparison: `gqa_answer` of the prediction against the true answer."""
    return gqa_answer(prediction) == answer.lower()


def lower_match(prediction: str, answer: str) -> bool:
    """OCR-VQA's comparison (Qwen-VL's `evaluate_exact_match_accuracy`): case and ends only."""
    return prediction.strip().lower() == answer.strip().lower()


def option_letter(prediction: str, options: int) -> str | None:
    """The option that an answer names, by LLaVA's ScienceQA parser; None where it names none.

    "B", "B. because", and "The answer is B." count; "B." does not, nor does a letter beyond the
    options. An answer without a letter is wrong, it is not matched to an option by its words.

    Args:
        prediction: The model's answer.
        options: How many options the question has.
    """
    text = prediction.strip()
    letter: str | None
    if text in _LETTERS:
        letter = text
    elif text[:1] in _LETTERS and text[1:3] == ". ":
        letter = text[0]
    else:
        named = _ANSWER_IS.findall(text)
        letter = named[0] if len(named) == 1 else None
    return letter if letter in _LETTERS[:options] else None


def pope_answer(prediction: str) -> str:
    """POPE's reading of an answer: "no" where its first sentence denies, else "yes".

    The official script keeps the text up to the first full stop, drops commas, and looks for the
    words "No", "not" and "no", so that "Nope" and an empty answer are a yes.
    """
    words = prediction.partition(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"
