"""Scorers against the official ones: values that visualqa.org's and pycocoevalcap's code printed.

`golden/captions.json` was written by pycocoevalcap 1.2 under Java 17: captions with what its
tokenizer made of them, and sets of predictions with CIDEr, BLEU, ROUGE-L, METEOR and its counts.
"""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.metrics.captions import bleu, bleu_counts, cider_d, rouge_l, tokenize
from cogvlm_sft.evaluation.metrics.exact import (
    exact_match,
    gqa_match,
    lower_match,
    option_letter,
    pope_answer,
)
from cogvlm_sft.evaluation.metrics.intervals import mean_of, mean_within, value_and_interval
from cogvlm_sft.evaluation.metrics.meteor import meteor, meteor_counts, meteor_program
from cogvlm_sft.evaluation.metrics.types import mean_per_type
from cogvlm_sft.evaluation.metrics.vqa import normalize, vqa_accuracy

GOLDEN = json.loads((Path(__file__).parent / "golden/captions.json").read_text(encoding="utf-8"))


def test_tokens_equal_the_java_tokenizer() -> None:
    wrong = [(text, tokenize(text), java) for text, java in GOLDEN["tokenizer"]
             if tokenize(text) != java]  # fmt: skip
    assert not wrong, wrong[:5]
    assert len(GOLDEN["tokenizer"]) > 2400


SETS = ["toy", "made", "hard"]


def _tokenized(name: str) -> tuple[list[str], list[list[str]]]:
    golden = GOLDEN["sets"][name]
    references = [[tokenize(text) for text in group] for group in golden["gts"].values()]
    return [tokenize(text) for text in golden["res"].values()], references


@pytest.mark.parametrize("name", SETS)
def test_caption_scores_equal_pycocoevalcap(name: str) -> None:
    predictions, references = _tokenized(name)
    official = GOLDEN["sets"][name]["official"]
    np.testing.assert_allclose(
        cider_d(predictions, references), official["per_image"], rtol=0, atol=1e-9
    )
    found = bleu(bleu_counts(predictions, references))
    assert found == pytest.approx(official["BLEU"], abs=1e-9)
    assert rouge_l(predictions, references).mean() == pytest.approx(official["ROUGE_L"], abs=1e-9)


@pytest.mark.parametrize("name", SETS)
def test_meteor_of_the_programs_counts_equals_its_own_score(name: str) -> None:
    official = GOLDEN["sets"][name]["official"]
    counts = np.array(official["meteor_rows"])
    assert meteor(counts) == pytest.approx(official["METEOR"], abs=1e-12)
    each = [meteor(row[None]) for row in counts]
    np.testing.assert_allclose(each, official["meteor_per_image"], rtol=0, atol=1e-12)


@pytest.mark.slow
def test_meteors_program_counts_as_under_pycocoevalcap() -> None:
    try:
        meteor_program()
    except DataError as error:
        pytest.skip(str(error))
    sets = [_tokenized(name) for name in SETS]
    counts = meteor_counts([p for one, _ in sets for p in one], [r for _, two in sets for r in two])
    official = [GOLDEN["sets"][name]["official"]["meteor_rows"] for name in SETS]
    assert counts.tolist() == [row for rows in official for row in rows]


def test_meteor_says_what_is_missing_and_what_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jar = tmp_path / "pycocoevalcap/meteor/meteor-1.5.jar"
    jar.parent.mkdir(parents=True)
    jar.touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match="needs Java"):
        meteor_program()
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\necho no memory >&2\nexit 1\n")
    java.chmod(0o755)
    with pytest.raises(DataError, match="failed: no memory"):
        meteor_counts(["a cat"], [["a cat"]])


def test_the_toy_set_scores_what_the_fact_says() -> None:
    assert GOLDEN["sets"]["toy"]["official"]["CIDEr"] == pytest.approx(2.573301, abs=1e-6)


def test_a_single_picture_has_no_cider_and_an_empty_caption_scores_nothing() -> None:
    assert cider_d(["a cat"], [["a cat"]])[0] == 0
    references = [["a cat sits", "one cat"], ["a dog runs", "two dogs"]]
    assert cider_d(["", "a dog runs"], references)[0] == 0
    assert rouge_l([""], [["a cat"]])[0] == 0


@pytest.mark.parametrize(
    ("answer", "official", "evalai"),
    [
        ("1,000", "1000", None),
        ("2:50 pm", "2:50 pm", None),
        ("girl's", "girl's", "girl 's"),
        ("Mc Donald's", "mc donald's", "mc donald 's"),
        ("dont", "don't", None),
        ("U.S.A.", "usa", None),
        ("3.5", "3.5", None),
        ("No. 5", "no 5", None),
        ("-5", "5", None),
        ("none", "0", None),
        ("t-shirt", "t shirt", None),
        ("yes, it is", "yes it is", None),
        ("$5", "$5", None),
        ("10%", "10%", None),
        ("a  Two dogs", "2 dogs", None),
        ("Im", "im", None),
        ("somebody'd", "somebodyd", None),
        ("shouldnt've", "shouldn't've", None),
        ("." * 33, ".", None),
        ("", "", None),
    ],
)
def test_answers_are_cleaned_as_officially(answer: str, official: str, evalai: str | None) -> None:
    assert normalize(answer) == official
    assert normalize(answer, "evalai") == (official if evalai is None else evalai)


@pytest.mark.parametrize(("equal", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0)])
def test_equal_humans_of_ten(equal: int, score: float) -> None:
    humans = ["red"] * equal + ["blue"] * (10 - equal)
    assert vqa_accuracy("red", humans) == pytest.approx(score)
    assert vqa_accuracy("Red", humans, "evalai") == pytest.approx(score)


def test_unanimous_answers_are_not_cleaned_by_the_official_scorer() -> None:
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0
    assert vqa_accuracy("yes", ["Yes."] * 10) == 0
    assert vqa_accuracy("yes", ["Yes."] * 9 + ["no"]) == 1
    assert vqa_accuracy("Yes", ["yes"] * 10, "evalai") == 1
    assert vqa_accuracy("", ["yes"] * 10) == 0
    with pytest.raises(ValueError, match="no human answer"):
        vqa_accuracy("yes", [])


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "gqa", "lower"),
    [
        ("7", "7", True, True, True),
        (" A cat. ", "a cat", True, True, False),
        ("a  cat", "a cat", True, False, False),
        ("", "7", False, False, False),
        ("77", "7", False, False, False),
        ("1.5", "15", False, False, False),
        ("Cat", "cat", True, True, True),
        ("Ann Lee", "ann lee ", True, False, True),
    ],
)
def test_exact_matches(prediction: str, answer: str, exact: bool, gqa: bool, lower: bool) -> None:
    found = (exact_match(prediction, answer), gqa_match(prediction, answer))
    assert (*found, lower_match(prediction, answer)) == (exact, gqa, lower)


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        (" B ", "B"),
        ("B. because it is red", "B"),
        ("The answer is C.", "C"),
        ("I think. The answer is A. Yes", "A"),
        ("E", None),
        ("b", None),
        ("Because", None),
        ("", None),
        ("The answer is A. The answer is B.", None),
        ("The answer is B, since", "B"),
        ("The answer is B", None),
        ("B.", None),
        ("B.x", None),
        ("E. The answer is B.", None),  # its first letter counts, and four options have no E
        ("F. The answer is B.", "B"),
    ],
)
def test_option_letters(prediction: str, letter: str | None) -> None:
    assert option_letter(prediction, 4) == letter


@pytest.mark.parametrize(
    ("prediction", "answer"),
    [
        ("Yes", "yes"),
        ("No, there is none.", "no"),
        ("There is not a cat", "no"),
        ("Yes. There is no dog.", "yes"),
        ("", "yes"),
        ("Nope", "yes"),
        ("NO", "yes"),
        ("I see, no", "no"),
    ],
)
def test_pope_reads_only_the_first_sentence(prediction: str, answer: str) -> None:
    assert pope_answer(prediction) == answer


def test_means_per_type_by_hand() -> None:
    right = [1, 1, 1, 0, 1, 0]
    kinds = ["color", "color", "color", "color", "count", "count"]
    answers = ["red", "red", "red", "blue", "1", "2"]
    everything = np.arange(6)
    assert mean_per_type(right, kinds, harmonic=False)(everything) == pytest.approx(0.625)
    assert mean_per_type(right, kinds, harmonic=True)(everything) == pytest.approx(0.6)
    # By answer: red 1, blue 0; 1 right, 2 wrong.
    plain = mean_per_type(right, kinds, harmonic=False, answers=answers)
    assert plain(everything) == pytest.approx(0.5)
    assert mean_per_type([1, 0], ["a", "b"], harmonic=True)(np.arange(2)) == 0


def test_intervals_hold_the_value_and_repeat() -> None:
    scores = [1.0] * 80 + [0.0] * 20
    value, (low, high) = value_and_interval(mean_of(scores), 100)
    assert value == 0.8
    assert 0.7 < low < 0.8 < high < 0.9
    assert (value, (low, high)) == value_and_interval(mean_of(scores), 100)
    inside = mean_within(scores, ["a"] * 80 + ["b"] * 20, "b")
    assert value_and_interval(inside, 100)[0] == 0
    assert math.isnan(mean_within([1.0], ["a"], "b")(np.arange(1)))
