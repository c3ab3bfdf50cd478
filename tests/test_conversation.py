"""The record: what is read back is what was written, and what is wrong names file and line."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvlm_sft.conversation import (
    Conversation,
    Turn,
    parse_conversation,
    read_conversations,
    resolve_image,
    strip_marker,
    write_conversations,
)
from cogvlm_sft.errors import DataError


def record(**changes: Any) -> dict[str, Any]:
    base = {
        "id": "a:1",
        "source": "a",
        "style": "chat",
        "images": ["pictures/bus.jpg"],
        "messages": [
            {"role": "user", "content": "<image>\nWhich colour?"},
            {"role": "assistant", "content": "White and red."},
        ],
        "meta": {"license": "CC-BY-4.0"},
    }
    return {**base, **changes}


words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: text.strip() and "<image>" not in text
)


@given(st.lists(st.tuples(words, words, st.booleans()), min_size=1, max_size=4))
def test_round_trip(rounds: list[tuple[str, str, bool]]) -> None:
    turns: list[Turn] = []
    for question, answer, train in rounds:
        turns += [Turn("user", question), Turn("assistant", answer, train)]
    conversation = Conversation("i", "s", "chat", (), tuple(turns), {"k": 1})
    line = json.dumps(conversation.to_record())
    assert parse_conversation(line, "x:1") == conversation


def test_files_round_trip(tmp_path: Path) -> None:
    conversations = [Conversation.from_record(record(id=f"a:{number}")) for number in range(3)]
    assert write_conversations(tmp_path / "conversations-00000-of-00001.jsonl", conversations) == 3
    assert list(read_conversations(tmp_path)) == conversations


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"images": []}, "1 <image> marker"),
        ({"images": ["a.jpg", "b.jpg"]}, "2 image(s)"),
        ({"images": ["../a.jpg"]}, "leaves the image root"),
        ({"images": ["/etc/passwd"]}, "leaves the image root"),
        ({"images": ["a\\..\\..\\b.jpg"]}, "leaves the image root"),
        ({"images": ["C:\\a.jpg"]}, "leaves the image root"),
        ({"images": "a.jpg"}, "must be a list"),
        ({"style": "poem"}, "expected one of chat"),
        ({"style": "text"}, "takes no image"),
        ({"extra": 1}, "unknown field 'extra'"),
        ({"messages": [{"role": "user", "content": "<image>hi"}]}, "no assistant turn"),
        ({"messages": []}, "non-empty list"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "expected 'user'"),
        ({"id": 3}, "id must be a non-empty string"),
    ],
)
def test_bad_record_names_file_and_line(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(record()) + "\n" + json.dumps(record(**changes)) + "\n")
    with pytest.raises(DataError) as caught:
        list(read_conversations(path))
    assert expected in str(caught.value)
    assert f"{path}:2" in str(caught.value)


@pytest.mark.parametrize("line", ["{", "[" * 5000, "\ufffe", '{"id": NaN', "3", '"x"', "null"])
def test_broken_json_is_an_error_of_ours(line: str) -> None:
    with pytest.raises(DataError, match="x:1"):
        parse_conversation(line, "x:1")


def test_symlink_may_not_leave_the_image_root(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"x")
    root = tmp_path / "images"
    root.mkdir()
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "inside.jpg").write_bytes(b"x")
    assert resolve_image(root, "inside.jpg") == root / "inside.jpg"
    with pytest.raises(DataError, match="out of the image root"):
        resolve_image(root, "link.jpg")
    with pytest.raises(DataError, match="missing"):
        resolve_image(root, "other.jpg")


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    write_conversations(path, [Conversation.from_record(record())])
    before = path.read_bytes()

    def broken() -> Any:
        yield Conversation.from_record(record())
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_conversations(path, broken())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_marker_goes_with_its_white_space() -> None:
    assert strip_marker("<image>\nWhat?") == "What?"
    assert strip_marker("What?\n<image>") == "What?"
    assert strip_marker("What \n<image>\n is it?") == "What is it?"
