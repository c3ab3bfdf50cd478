"""Control markers in any spelling never survive, and what is left reads as a person would write."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders.clean import (
    clean_answer,
    clean_question,
    dialogue,
    human_answers,
    rounds,
    text_of,
)


@pytest.mark.parametrize(
    "text, left",
    [
        ("Yes</s>.", "Yes."), ("Yes</S>", "Yes"), ("Yes</s >no", "Yes no"), ("< /s>Yes", "Yes"),
        ("<eoi> Yes", "Yes"), ("Yes < EOI >\n\nno", "Yes\n\nno"), ("a<EOI>,b", "a,b"),
        ("(<s>a</s>)", "(a)"), ("a </</s>s> b", "a b"), ("[/ INST ]a[INST]", "a"),
        ("<|im_end|>a<|endoftext|>", "a"), ("<im_start>a<image>", "a"), ("</s></S>\n<EOI>", ""),
        ("\u200b\ufeff \u3000", ""), ("\ufeffcafe\u0301\u200b", "café"), ("a\r\nb\rc", "a\nb\nc"),
        ("1 < 2 and s > 1", "1 < 2 and s > 1"), ("<strong>a</strong>", "<strong>a</strong>"),
        ("[INSTALL]", "[INSTALL]"), ("Question:", ""), ("A Question: b", "A Question: b"),
        ("Yes.\nQuestion: what? Answer: it.", "Yes.\nwhat? Answer: it."),
        ("</s> Question: Question:why?", "why?"),
    ],
)  # fmt: skip
def test_what_is_left_of_an_answer(text, left):
    assert clean_answer(text, Counter()) == left


@pytest.mark.parametrize(
    "text, left",
    [
        ("<image>\nWhat?", "What?"), ("What?\n<image>", "What?"), ("<image>", ""),
        ("What is this<image>?", "What is this?"), ("Look at <image> well", "Look at well"),
        ("Look.\n<image>\nWhat?", "Look.\nWhat?"), ("<image>\n<Image>\nTwice?", "Twice?"),
        ("A?\n\n<image>", "A?"), ("<image>A?<EOI>", "A?"),
    ],
)  # fmt: skip
def test_what_is_left_of_a_question(text, left):
    assert clean_question(text) == left


PIECES = st.sampled_from(
    [
        "<",
        ">",
        "/",
        "s",
        "S",
        " ",
        "\n",
        "EOI",
        "eoi",
        "image",
        "</s>",
        "<EOI>",
        "[INST]",
        "|",
        "a",
        "é",
    ]
)


@settings(max_examples=300)
@given(st.lists(PIECES, max_size=14).map("".join))
def test_no_marker_survives_whatever_it_is_made_of(text):
    for left in (clean_answer(text, Counter()), clean_question(text)):
        assert not re.search(
            r"</?\s?s\s?>|<\s?EOI\s?>|<\s?image\s?>|\[/?INST\]", left, re.IGNORECASE
        )
        assert left == left.strip()
        assert clean_answer(left, Counter()) == left


@pytest.mark.parametrize("mark", "\u00ad\u200b\u200c\u200d\u2060\ufeff")
def test_unseen_marks_hide_no_marker(mark):
    for text in (f"<{mark}EOI>", f"<EOI{mark}>", f"<{mark}/{mark}s>", f"[{mark}INST]"):
        assert clean_answer(f"a {text} b", Counter()) == clean_question(f"a {text} b") == "a b"


def test_markers_nested_without_end_are_a_reason_to_drop():
    """Each round takes the innermost out; thousands of rounds over a long text would be hours."""
    bomb = "<s" * 20_000 + ">" * 20_000
    assert rounds(["What?", bomb], Counter()) == "control_markers_nested"
    assert rounds([bomb, "That."], Counter()) == "control_markers_nested"
    assert rounds(["What?", "<s" * 9 + ">" * 9 + "That."], Counter()) == ["What?", "That."]


def test_roles_are_told_whatever_their_case():
    turns = [{"from": " Human ", "value": "q"}, {"role": "ASSISTANT", "content": "a"}]
    assert dialogue(turns, Counter()) == ["q", "a"]
    assert dialogue([{"from": "narrator", "value": "q"}], Counter()) == "unknown_role"


@pytest.mark.parametrize(
    "value, text",
    [
        (7, "7"), (7.0, "7"), (0.5, "0.5"), (True, "yes"), (float("nan"), None),
        (float("inf"), None), (1e22, None), (10**30, None), ([], None), (None, None),
    ],
)  # fmt: skip
def test_what_stands_for_a_short_text(value, text):
    assert text_of(value) == text


def test_answers_of_several_people_are_stripped_before_they_are_counted():
    assert human_answers([" net", {"answer": "net "}, "", {"answer": None}, 3]) == [
        "net",
        "net",
        "3",
    ]
