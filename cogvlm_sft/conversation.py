"""The conversation record: the one contract between the data builders and training.

A conversation is one JSON object a line: an id, a source, a prompt style, image paths relative to
an image root, and alternating user and assistant turns whose text holds `<image>` where a picture
stands. Notable choices: content stays a string (content-part lists do not survive Arrow), `images`
is always a list, paths never leave the image root (checked here, symlinks included). No torch and
no transformers.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

import jsonlines

from cogvlm_sft.errors import DataError

Style = Literal["chat", "vqa", "base", "text"]
Role = Literal["user", "assistant"]

STYLES: tuple[Style, ...] = get_args(Style)
ROLES: tuple[Role, ...] = get_args(Role)
IMAGE_MARKER = "<image>"

_MARKER_WITH_SPACE = re.compile(rf"\s*{IMAGE_MARKER}\s*")
_FIELDS = {"id", "source", "style", "images", "messages", "meta"}


@dataclass(frozen=True, slots=True)
class Turn:
    """One message.

    Attributes:
        role: `user` or `assistant`.
        content: The text, with `<image>` where a picture stands (user turns only).
        train: Whether an assistant turn may carry loss.
    """

    role: Role
    content: str
    train: bool = True


@dataclass(frozen=True, slots=True)
class Conversation:
    """A validated conversation about any number of pictures.

    Attributes:
        id: Unique in its build.
        source: Name of the data set that it comes from.
        style: Prompt template: `chat`, `vqa`, `base`, or `text` (no picture).
        images: Paths relative to the image root, in the order of their markers.
        turns: Alternating turns, the first by the user, at least one by the assistant.
        meta: Licence and origin; carried along, never read by training.
    """

    id: str
    source: str
    style: Style
    images: tuple[str, ...]
    turns: tuple[Turn, ...]
    meta: dict[str, Any] = field(default_factory=dict)

    def rounds(self) -> list[tuple[Turn, Turn]]:
        """Question and answer pairs, in order; a last question without an answer is left out."""
        return list(zip(self.turns[::2], self.turns[1::2], strict=False))

    def to_record(self) -> dict[str, Any]:
        """The JSON object of this conversation."""
        messages: list[dict[str, Any]] = []
        for turn in self.turns:
            message: dict[str, Any] = {"role": turn.role, "content": turn.content}
            if not turn.train:
                message["train"] = False
            messages.append(message)
        return {
            "id": self.id,
            "source": self.source,
            "style": self.style,
            "images": list(self.images),
            "messages": messages,
            "meta": self.meta,
        }

    @classmethod
    def from_record(cls, record: Any, where: str = "record") -> "Conversation":
        """Validates one JSON object.

        Args:
            record: The decoded JSON value.
            where: `file:line`, for the message.

        Raises:
            DataError: A field is missing, unknown or of the wrong type; roles do not alternate;
                no assistant turn; the number of `<image>` markers is not the number of images; a
                path is absolute or climbs out of the image root.
        """
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object, found {_kind(record)}")
        unknown = sorted(set(record) - _FIELDS)
        if unknown:
            raise DataError(
                f"{where}: unknown field {unknown[0]!r}; a conversation has {sorted(_FIELDS)}"
            )
        identity = _text(record, "id", where)
        where = f"{where} ({identity})"
        style = _text(record, "style", where, default="chat" if record.get("images") else "text")
        if style not in STYLES:
            raise DataError(f"{where}: style is {style!r}, expected one of {', '.join(STYLES)}")
        images = record.get("images", [])
        if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
            raise DataError(f"{where}: images must be a list of paths, found {_kind(images)}")
        for path in images:
            check_relative(path, where)
        meta = record.get("meta", {})
        if not isinstance(meta, dict):
            raise DataError(f"{where}: meta must be an object, found {_kind(meta)}")
        turns = _turns(record.get("messages"), where)
        markers = sum(turn.content.count(IMAGE_MARKER) for turn in turns)
        if markers != len(images):
            raise DataError(
                f"{where}: {markers} {IMAGE_MARKER} marker(s) in the messages but {len(images)} "
                f"image(s); every image needs one marker in a user turn"
            )
        if style == "text" and images:
            raise DataError(f"{where}: style 'text' takes no image, found {len(images)}")
        return cls(identity, _text(record, "source", where), style, tuple(images), turns, meta)


def conversation_files(path: Path) -> list[Path]:
    """The JSON Lines files of a build folder, in order, or the single file itself.

    Raises:
        DataError: Nothing is there.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: no such file or build folder; `cogvlm-sft data build` makes one")
    files = sorted(path.glob("conversations-*.jsonl"))
    if not files:
        raise DataError(f"{path}: holds no conversations-*.jsonl; is it a build folder?")
    return files


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Reads and validates a file or a build folder, one conversation at a time.

    Raises:
        DataError: With file and line, at the first record that is not valid.
    """
    for file in conversation_files(path):
        for number, line in _lines(file):
            yield parse_conversation(line, f"{file}:{number}")


def parse_conversation(line: str | bytes, where: str) -> Conversation:
    """Decodes and validates one line.

    Raises:
        DataError: The line is not JSON, not UTF-8, or not a conversation.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error})") from None
    return Conversation.from_record(record, where)


def write_conversations(path: Path, conversations: Iterable[Conversation]) -> int:
    """Writes a JSON Lines file beside its name and renames it when complete.

    Returns:
        The number of conversations written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    count = 0
    try:
        with jsonlines.open(partial, "w", compact=True) as writer:
            for conversation in conversations:
                writer.write(conversation.to_record())
                count += 1
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


def check_relative(path: str, where: str) -> None:
    """Refuses a path that is empty, absolute, or climbs with `..`.

    Raises:
        DataError: Naming the path.
    """
    pure = PurePosixPath(path.replace("\\", "/"))
    drive = re.match(r"^[A-Za-z]:", path)
    if not path or "\0" in path or pure.is_absolute() or drive or ".." in pure.parts:
        raise DataError(
            f"{where}: image path {path!r} leaves the image root; "
            "paths are relative to it and hold no '..'"
        )


def resolve_image(image_root: Path, relative: str, where: str = "conversation") -> Path:
    """The file of an image, certainly inside the image root.

    Args:
        image_root: Folder that all paths are relative to.
        relative: Path of the record.
        where: What to name in the message.

    Raises:
        DataError: The path leaves the root (a symlink may not lead out either), or is missing.
    """
    check_relative(relative, where)
    root = image_root.resolve()
    target = (root / relative).resolve()
    if not target.is_relative_to(root):
        raise DataError(f"{where}: image {relative!r} leads out of the image root {image_root}")
    if not target.is_file():
        raise DataError(
            f"{where}: image {relative!r} is missing under {image_root}; "
            "give the folder that the paths are relative to (data.image_root, --images)"
        )
    return target


def strip_marker(text: str) -> str:
    """The text without `<image>` and the white space around each; ends are stripped."""
    return _MARKER_WITH_SPACE.sub(" ", text).strip() if IMAGE_MARKER in text else text.strip()


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line


def _turns(messages: Any, where: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages must be a non-empty list, found {_kind(messages)}")
    turns: list[Turn] = []
    for index, message in enumerate(messages):
        spot = f"{where}: message {index}"
        if not isinstance(message, dict):
            raise DataError(f"{spot} must be an object, found {_kind(message)}")
        expected = ROLES[index % 2]
        if message.get("role") != expected:
            raise DataError(
                f"{spot} has role {message.get('role')!r}, expected {expected!r}: "
                "turns alternate and the user begins"
            )
        content = message.get("content")
        if not isinstance(content, str):
            raise DataError(f"{spot}: content must be a string, found {_kind(content)}")
        train = message.get("train", True)
        if not isinstance(train, bool):
            raise DataError(f"{spot}: train must be true or false, found {train!r}")
        if expected == "assistant":
            if IMAGE_MARKER in content:
                raise DataError(f"{spot}: an assistant turn holds {IMAGE_MARKER}")
            if not content.strip():
                raise DataError(f"{spot}: the answer is empty")
        turns.append(Turn(expected, content, train))
    if len(turns) < 2:
        raise DataError(f"{where}: no assistant turn; a conversation needs at least one answer")
    return tuple(turns)


def _text(record: dict[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = record.get(key, default)
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: {key} must be a non-empty string, found {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
