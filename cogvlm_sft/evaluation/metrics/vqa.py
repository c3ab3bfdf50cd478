"""VQA accuracy against ten human answers, in both normalisations that published figures use.

`official` is the code of visualqa.org (VQAv2, OKVQA, VizWiz): it cleans the answers only where the
ten differ, so that "Yes" scores 0 against ten times "yes". `evalai` is the m4c evaluator (TextVQA):
it always cleans, and cuts "'s" off first. Both score a question by the mean over its ten subsets of
nine humans of min(1, matches / 3). Their slips are kept, because the figures in papers have them:
the expression that should protect decimal points has a mistyped look-behind and removes every full
stop without a digit behind it (and the first 32 only), and contractions with a capital never match.
"""

import re
from collections.abc import Sequence
from typing import Literal

Normalization = Literal["official", "evalai"]

# In this order: a mark is judged by the spaces around it in the text as given.
_MARKS = (';', "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`",
          ",", "?", "!")  # fmt: skip
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_STOPS_REMOVED = 32  # the official code hands re.UNICODE over as the count
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5",
    "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = ("a", "an", "the")
_CONTRACTIONS_WRITTEN = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
# Each contraction is written with one of its apostrophes missing; one entry is the other way round.
_CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word
    for word in _CONTRACTIONS_WRITTEN.split()
    for at, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def normalize(answer: str, normalization: Normalization = "official") -> str:
    """An answer as the official scorers compare it.

    Args:
        answer: The model's or a human's.
        normalization: `evalai` lowers the case and cuts ",", "?" and "'s" off first.
    """
    if normalization == "evalai":
        answer = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _digits_and_articles(_punctuation(_one_line(answer)))


def vqa_accuracy(
    prediction: str, answers: Sequence[str], normalization: Normalization = "official"
) -> float:
    """Accuracy of one question, 0 to 1: 0, 0.3, 0.6, 0.9 or 1 for 0 to 4 equal humans of ten.

    Args:
        prediction: The model's answer; an empty one is a wrong one, unless humans gave it.
        answers: The humans' answers, ten in the official files.
        normalization: See the module.

    Raises:
        ValueError: There is no human answer.
    """
    if not answers:
        raise ValueError("no human answer to compare with")
    humans = list(answers)
    if normalization == "evalai":
        prediction = normalize(prediction, "evalai")
        humans = [normalize(answer, "evalai") for answer in humans]
    else:
        prediction = _one_line(prediction)
        humans = [_one_line(answer) for answer in humans]
        if len(set(humans)) > 1:
            prediction = _digits_and_articles(_punctuation(prediction))
            humans = [_digits_and_articles(_punctuation(answer)) for answer in humans]
    matches = [answer == prediction for answer in humans]
    total = sum(matches)
    return sum(min(1.0, (total - one) / 3) for one in matches) / len(matches)


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _punctuation(answer: str) -> str:
    cleaned = answer
    all_go = _DIGIT_COMMA_DIGIT.search(answer) is not None
    for mark in _MARKS:
        at_a_space = f"{mark} " in answer or f" {mark}" in answer
        cleaned = cleaned.replace(mark, "" if all_go or at_a_space else " ")
    return _FULL_STOP.sub("", cleaned, count=_STOPS_REMOVED)


def _digits_and_articles(answer: str) -> str:
    words = [_NUMBERS.get(word, word) for word in answer.lower().split()]
    kept = [word for word in words if word not in _ARTICLES]
    return " ".join(_CONTRACTIONS.get(word, word) for word in kept)
