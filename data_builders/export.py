"""Writes a build in the form that another trainer reads.

`trl`: JSON Lines with `messages` and `images`, markers taken out (TRL places the picture before the
first question and would leave a literal `<image>` in the text); every row has `images`, an empty
list where it is text only, so that the column has one type. `llama-factory` and `ms-swift` read the
record's own shape; the first also wants an entry in `dataset_info.json`. `llava` is LLaVA's JSON
list, which knows one picture a record. Paths stay relative unless an image root is given.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import orjson

from cogvlm_sft.conversation import Conversation, read_conversations, strip_marker
from cogvlm_sft.errors import DataError

Target = Literal["trl", "llama-factory", "ms-swift", "llava"]
TARGETS: tuple[Target, ...] = get_args(Target)


def export(
    build: Path | str, to: str, out: Path | str, image_root: Path | str | None = None
) -> int:
    """Exports a build folder.

    Args:
        build: The build folder.
        to: One of `TARGETS`.
        out: Folder to write; must not exist, or be empty.
        image_root: Given, paths are written as absolute ones below it.

    Returns:
        Conversations written.

    Raises:
        DataError: Unknown target, a folder that holds something, or a record that the target
            cannot hold.
    """
    if to not in TARGETS:
        raise DataError(f"cannot export to {to!r}; known are {', '.join(TARGETS)}")
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: exists and is not an empty folder; choose another")
    root = None if image_root is None else Path(image_root).resolve()
    staging = folder.with_name(f".{folder.name}.exporting")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        count = _WRITERS[to](read_conversations(Path(build)), staging, root)
        if folder.exists():
            folder.rmdir()
        os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return count


def _paths(conversation: Conversation, root: Path | None) -> list[str]:
    if root is None:
        return list(conversation.images)
    return [str(root / path) for path in conversation.images]


def _messages(conversation: Conversation, strip: bool) -> list[dict[str, Any]]:
    return [
        {"role": turn.role, "content": strip_marker(turn.content) if strip else turn.content}
        for turn in conversation.turns
    ]


def _lines(path: Path, rows: Iterator[dict[str, Any]]) -> int:
    count = 0
    with path.open("wb") as stream:
        for row in rows:
            stream.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            count += 1
    return count


def _trl(conversations: Iterator[Conversation], out: Path, root: Path | None) -> int:
    return _lines(
        out / "train.jsonl",
        ({"images": _paths(c, root), "messages": _messages(c, strip=True)} for c in conversations),
    )


def _swift(conversations: Iterator[Conversation], out: Path, root: Path | None) -> int:
    def rows() -> Iterator[dict[str, Any]]:
        for conversation in conversations:
            messages = _messages(conversation, strip=False)
            for message, turn in zip(messages, conversation.turns, strict=True):
                if turn.role == "assistant" and not turn.train:
                    message["loss"] = False
            yield {
                "messages": messages,
                "images": _paths(conversation, root),
                "channel": conversation.source,
            }

    return _lines(out / "train.jsonl", rows())


def _llama_factory(conversations: Iterator[Conversation], out: Path, root: Path | None) -> int:
    count = _lines(
        out / "cogvlm_sft.jsonl",
        ({"messages": _messages(c, strip=False), "images": _paths(c, root)} for c in conversations),
    )
    info = {
        "cogvlm_sft": {
            "file_name": "cogvlm_sft.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {
                "role_tag": "role",
                "content_tag": "content",
                "user_tag": "user",
                "assistant_tag": "assistant",
            },
        }
    }
    (out / "dataset_info.json").write_bytes(orjson.dumps(info, option=orjson.OPT_INDENT_2))
    return count


def _llava(conversations: Iterator[Conversation], out: Path, root: Path | None) -> int:
    count = 0
    with (out / "train.json").open("wb") as stream:
        for conversation in conversations:
            if len(conversation.images) > 1:
                raise DataError(
                    f"{conversation.id}: {len(conversation.images)} pictures; LLaVA's format holds "
                    "one a record"
                )
            row: dict[str, Any] = {"id": conversation.id}
            if conversation.images:
                row["image"] = _paths(conversation, root)[0]
            row["conversations"] = [
                {"from": "human" if turn.role == "user" else "gpt", "value": turn.content}
                for turn in conversation.turns
            ]
            stream.write(b",\n" if count else b"[\n")
            stream.write(orjson.dumps(row))
            count += 1
        stream.write(b"\n]\n" if count else b"[]\n")
    return count


_WRITERS: dict[str, Callable[[Iterator[Conversation], Path, Path | None], int]] = {
    "trl": _trl,
    "llama-factory": _llama_factory,
    "ms-swift": _swift,
    "llava": _llava,
}
