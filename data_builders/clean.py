"""Turns what a data set calls a dialogue into clean question and answer texts.

Rules, each from how the released sets fail their users: only what is blank at the ends goes, inner
newlines stay; Unicode is NFC; control markers of other templates (`</s>`, `<EOI>`, `[INST]`, a
literal `<image>`), in any case and spacing, never survive in a text, because the released CogVLM
strips them from prompts but trains on them in answers, and no line of an answer begins with the
prompt's own `Question:`; a leading answer or a trailing question is cut, an empty round is taken
out. Every repair is counted under a name, every drop has a reason: nothing vanishes silently. A
text is a plain string and a dialogue a flat list, since this runs once per turn of a build.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

ROLES: dict[str, int] = {
    "human": 0, "user": 0, "question": 0,
    "gpt": 1, "assistant": 1, "chatgpt": 1, "bot": 1, "model": 1, "answer": 1,
}  # fmt: skip

_UNSEEN = "\u00ad\u200b\u200c\u200d\u200e\u200f\u2060\ufeff"  # zero-width marks show as nothing
_GAP = rf"[\s{_UNSEEN}]{{0,3}}"
_CONTROL = re.compile(
    rf"[ \t]{{0,9}}(?:<{_GAP}/?{_GAP}(?:s|EOI|BOI|pad|unk|image|im_start|im_end|im_patch)"
    rf"{_GAP}/?{_GAP}>"
    rf"|<\|{_GAP}(?:im_start|im_end|endoftext|begin_of_text|end_of_text|eot_id){_GAP}\|>"
    rf"|\[{_GAP}/?{_GAP}INST{_GAP}\])[ \t]*",
    re.IGNORECASE,
)
_LABEL = re.compile(r"^(?:[ \t]*Question:)+[ \t]*", re.MULTILINE)
_NESTED = 16  # a text of more markers inside each other is no text
_REFUSAL = re.compile(r"\bas an ai\b|message is empty")
_OF_THE_PROMPT = (
    "no mention of", "bounding box", "provided caption", "given caption", "provided description",
    "given description", "provided image caption", "given image caption", "dense caption",
)  # fmt: skip
_HINTS = ("mention", "nding box", "aption", "escription", "n AI", " empty")
_ALIEN = re.compile("[\x00\ud800-\udfff]")
_CLOSING = frozenset(".,;:!?)]}\n")
# what strips as white space does, and shows as little: zero-width marks, byte order marks
_BLANK = (
    "".join(c for c in map(chr, range(0x3001)) if c.isspace()) + "\u200b\u200e\u200f\u2060\ufeff"
)


def clean_question(text: str) -> str:
    """A question without picture markers and control markers, ends stripped."""
    if "<image>" in text:
        text = _without_markers(text)
    return _plain(text)


def clean_answer(text: str, notes: Counter[str]) -> str:
    """An answer without control markers and without `Question:` where a line begins, stripped.

    Args:
        text: As released.
        notes: Repairs are counted here.
    """
    if ("<" in text or "[" in text) and _CONTROL.search(text):
        notes["control_marker_removed"] += 1
    plain = _plain(text)
    if "Question:" in plain and _LABEL.search(plain):
        notes["question_label_removed"] += 1
        plain = _LABEL.sub("", plain).strip()
    return plain


def flags_of(text: str) -> list[str]:
    """What is odd about answers that stay: they refuse, or speak of the prompt that made them.

    Sets written by a language model from captions hold such answers. LRV's rules drop them; of
    other sets they are kept and named in `meta.flags`, so that a user can filter.

    Args:
        text: All answers of a conversation.
    """
    if not any(hint in text for hint in _HINTS):  # of plain words, most cheaply told
        return []
    low = text.lower()
    flags = []
    if ("as an ai" in low or "is empty" in low) and _REFUSAL.search(low):
        flags.append("refusal")
    if any(phrase in low for phrase in _OF_THE_PROMPT):
        flags.append("speaks_of_the_prompt")
    return flags


def _plain(text: str) -> str:
    if "<" in text or "[" in text:
        for _ in range(_NESTED):  # taking one out may join the halves of another
            if not _CONTROL.search(text):
                break
            text = _CONTROL.sub(_join_words, text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii():
        return text.strip()
    return unicodedata.normalize("NFC", text).strip(_BLANK)


def _join_words(marker: re.Match[str]) -> str:
    """What stands in a marker's place: a blank, but none before punctuation or a line's end."""
    text, start, end = marker.string, marker.start(), marker.end()
    bare = start == 0 or text[start - 1] in "\n(" or end == len(text) or text[end] in _CLOSING
    return "" if bare else " "


def _without_markers(text: str) -> str:
    """The question around picture markers, which go with the white space around them."""
    left, *rest = text.split("<image>")
    for right in rest:
        before, after = left.rstrip(), right.lstrip()
        own_line = "\n" in left[len(before) :] or "\n" in right[: len(right) - len(after)]
        bare = not before or not after or after[0] in _CLOSING
        left = before + ("" if bare else "\n" if own_line else " ") + after
    return left


def has_alien(text: str) -> bool:
    """Whether a text holds NUL or half of a surrogate pair: it cannot be written as UTF-8 text."""
    return _ALIEN.search(text) is not None


def has_marker(text: str) -> bool:
    """Whether a cleaned text still holds a control marker: they were nested too deeply."""
    return ("<" in text or "[" in text) and _CONTROL.search(text) is not None


def dialogue(messages: Any, notes: Counter[str]) -> list[str] | str:
    """Question, answer, question, answer … of a list of turns, or the reason to drop it.

    Args:
        messages: Objects with `from`/`value` (LLaVA) or `role`/`content`, a text or parts.
        notes: Repairs are counted here.

    Returns:
        A flat list of even length, or the name of the reason.
    """
    if type(messages) is not list:
        return "turns_missing"
    turns: list[str] = []
    expected = 0
    for message in messages:
        if type(message) is not dict:
            return "turn_not_an_object"
        role = message.get("from") or message.get("role")
        part = ROLES.get(role) if type(role) is str else None
        if part is None and type(role) is str:
            part = ROLES.get(role.strip().lower())
        if part is None:
            return "unknown_role"
        text = message.get("value")
        if text is None:
            text = message.get("content")
        if type(text) is list:
            text = _text_parts(text)
        if type(text) is not str:
            return "text_not_a_string"
        if part != expected:
            if turns:
                return "roles_do_not_alternate"
            notes["leading_answer_removed"] += 1
            continue
        turns.append(text)
        expected ^= 1
    if expected:
        turns.pop()
        if turns:
            notes["trailing_question_removed"] += 1
    if not turns:
        return "no_assistant_turn"
    return rounds(turns, notes)


def _text_parts(parts: list[Any]) -> str | None:
    """The words of a content in parts, pictures among them, as processors take it."""
    texts: list[str] = []
    for part in parts:
        if type(part) is dict and part.get("type") == "text":
            if type(part.get("text")) is not str:
                return None
            texts.append(part["text"])
    return "\n".join(texts)


def rounds(turns: list[str], notes: Counter[str]) -> list[str] | str:
    """Cleans a flat list of questions and answers and takes out empty rounds."""
    cleaned: list[str] = []
    empty = "empty_answer"
    for place in range(0, len(turns), 2):
        question = clean_question(turns[place])
        answer = clean_answer(turns[place + 1], notes)
        if has_marker(question) or has_marker(answer):
            return "control_markers_nested"
        if question and answer:
            cleaned.append(question)
            cleaned.append(answer)
            continue
        empty = "empty_answer" if question else "empty_question"
    if not cleaned:
        return empty
    if len(cleaned) < len(turns):
        notes["empty_round_removed"] += (len(turns) - len(cleaned)) // 2
    return cleaned


def text_of(value: Any) -> str | None:
    """The text of a JSON or table value that stands for a short text; None if it is none."""
    if type(value) is str:
        return value
    if type(value) is bool:
        return "yes" if value else "no"
    if type(value) is int:  # Python refuses to write out numbers of thousands of digits
        return str(value) if abs(value) < 1 << 64 else None
    if type(value) is float and abs(value) < 1 << 53:  # False for NaN; above, digits are made up
        return str(int(value)) if value.is_integer() else repr(value)
    return None


def human_answers(answers: Any) -> list[str]:
    """The texts of a list of answers: strings, or objects with `answer`."""
    if type(answers) is not list:
        return []
    texts = [text_of(a.get("answer") if type(a) is dict else a) for a in answers]
    return [text.strip() for text in texts if text and text.strip()]


def choose(requests: Sequence[str], text: str) -> str:
    """One of several requests, by the hash of the text it asks for: the same in every build."""
    digest = blake2b(text.encode("utf-8", "replace"), digest_size=2).digest()
    return requests[int.from_bytes(digest, "big") % len(requests)]


def majority(answers: list[str]) -> str:
    """The most frequent answer, the first given where several are; facts of VQA-like sets.

    Args:
        answers: At least one answer by a person.
    """
    counts = Counter(answers)
    best = max(counts.values())
    return next(answer for answer in answers if counts[answer] == best)
