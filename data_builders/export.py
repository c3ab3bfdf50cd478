"""Writes a build in the form that another trainer reads.

`trl`: Parquet with `messages` and `images`, markers taken out (TRL places the pictures before the
first question and would leave a literal `<image>` in the text); its schema says that `images` are
pictures, so `datasets` opens them by itself, and every row has the list, empty where it is text
only. `llama-factory` and `ms-swift` read the record's own shape; the first also wants an entry in
`dataset_info.json`. `llava` is LLaVA's JSON list, which knows one picture a record. `webdataset` is
tar files that hold the pictures too. Only ms-swift's `loss` and webdataset's whole records can say
that an answer is not to be learnt; the other targets refuse such an answer. Pictures that these
readers would get wrong (turned by EXIF, transparent, CMYK, 16-bit, animated, with a wrong ending)
are written beside as plain copies. Paths stay relative, and pictures unseen, unless an image root
is given.
"""

import errno
import io
import os
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import orjson
from PIL import Image

from cogvlm_sft.conversation import (
    IMAGE_MARKER,
    Conversation,
    read_conversations,
    resolve_image,
    strip_marker,
)
from cogvlm_sft.errors import DataError
from data_builders.image_check import oddities, upright_rgb
from data_builders.progress import progress

Target = Literal["trl", "llama-factory", "ms-swift", "llava", "webdataset"]
TARGETS: tuple[Target, ...] = get_args(Target)
TAR_BYTES = 1 << 30
_ROWS = 10_000


def export(
    build: Path | str, to: str, out: Path | str, image_root: Path | str | None = None
) -> int:
    """Exports a build folder.

    Args:
        build: The build folder.
        to: One of `TARGETS`.
        out: Folder to write; must not exist, or be empty.
        image_root: Given, paths are written as absolute ones below it; `webdataset` needs it.

    Returns:
        Conversations written.

    Raises:
        DataError: Unknown target, a folder that holds something or cannot be written, a picture
            that is missing or broken, or a record that the target cannot hold.
    """
    if to not in TARGETS:
        raise DataError(f"cannot export to {to!r}; known are {', '.join(TARGETS)}")
    try:
        return _export(build, to, Path(out), image_root)
    except OSError as error:
        if error.errno == errno.EPIPE:  # who reads our progress went away
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise DataError(
            f"{out}: cannot be written, {error.strerror or error}{where}; nothing was exported"
        ) from None


def _export(build: Path | str, to: str, folder: Path, image_root: Path | str | None) -> int:
    """The whole export, or nothing of it."""
    if folder.is_symlink():  # it stays one
        folder = Path(os.path.realpath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder}: exists and is not an empty folder; choose another")
    staging = folder.with_name(f".{folder.name}.exporting")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    pictures = _Pictures(image_root, staging, folder.absolute())
    try:
        count = _WRITERS[to](_counted(build), staging, pictures)
        os.rename(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return count


def _counted(build: Path | str) -> Iterator[Conversation]:
    with progress(None, "exporting", " conversations", scale=True) as bar:
        for conversation in read_conversations(Path(build)):
            yield conversation
            bar.update()


class _Pictures:
    """Where the trainer finds each picture; odd ones are copied in a plain form."""

    def __init__(self, root: Path | str | None, staging: Path, folder: Path) -> None:
        self.root = None if root is None else Path(root).resolve()
        self._staging = staging
        self._folder = folder
        self._known: dict[str, str] = {}

    def paths(self, conversation: Conversation) -> list[str]:
        """The paths to write for a conversation's pictures."""
        return [self._path(relative, conversation.id) for relative in conversation.images]

    def _path(self, relative: str, where: str) -> str:
        if self.root is None:
            return relative
        known = self._known.get(relative)
        if known is None:
            file = resolve_image(self.root, relative, where)
            plain = _plain_copy(file, where)
            if plain is None:
                known = str(self.root / relative)
            else:
                copy = f"images/{relative}.{plain[0]}"
                (self._staging / copy).parent.mkdir(parents=True, exist_ok=True)
                (self._staging / copy).write_bytes(plain[1])
                known = str(self._folder / copy)
            self._known[relative] = known
        return known

    def content(self, relative: str, where: str) -> tuple[str, bytes]:
        """Ending and bytes of a picture in a form that every reader gets right."""
        if self.root is None:
            raise DataError("webdataset holds the pictures themselves: give the image root")
        file = resolve_image(self.root, relative, where)
        return _plain_copy(file, where) or (file.suffix[1:].lower(), file.read_bytes())


def _plain_copy(file: Path, where: str) -> tuple[str, bytes] | None:
    """Ending and bytes of an upright RGB copy; None where the file itself is as plain."""
    try:
        with Image.open(file) as image:
            if not oddities(image, file.suffix):
                return None
            kind = "JPEG" if image.format in ("JPEG", "MPO") else "PNG"
            plain = upright_rgb(image, "white")
    except Exception as error:  # Pillow raises whatever a broken file provokes
        raise DataError(
            f"{where}: picture {file} cannot be decoded ({error}); run `cogvlm-sft data verify`"
        ) from None
    stream = io.BytesIO()
    plain.save(stream, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}))
    return ("jpg" if kind == "JPEG" else "png"), stream.getvalue()


def _all_learnt(conversation: Conversation, target: str) -> None:
    """Refuses a turn that must not be learnt, for formats that cannot say so."""
    if any(turn.role == "assistant" and not turn.train for turn in conversation.turns):
        raise DataError(
            f"{conversation.id}: has an answer with `train: false`, and {target} would learn it; "
            "export to ms-swift or webdataset, or take such conversations out of the build"
        )


def _markers_first(conversation: Conversation, target: str) -> None:
    """Refuses a picture in a later turn, for readers that show all pictures at the beginning."""
    if any(IMAGE_MARKER in turn.content for turn in conversation.turns[1:]):
        raise DataError(
            f"{conversation.id}: shows a picture in a later turn; {target} shows all pictures at "
            "the beginning"
        )


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


def _trl(conversations: Iterator[Conversation], out: Path, pictures: _Pictures) -> int:
    import pyarrow
    from datasets import Features, Image, List, Value
    from pyarrow.parquet import ParquetWriter

    message = {"role": Value("string"), "content": Value("string")}
    schema = Features({"images": List(Image()), "messages": List(message)}).arrow_schema
    count = 0
    with ParquetWriter(out / "train.parquet", schema) as writer:
        rows: list[dict[str, Any]] = []

        def write() -> None:
            writer.write_table(pyarrow.Table.from_pylist(rows, schema))
            rows.clear()

        for conversation in conversations:
            _markers_first(conversation, "TRL")
            _all_learnt(conversation, "TRL")
            paths = pictures.paths(conversation)
            rows.append(
                {
                    "images": [{"bytes": None, "path": path} for path in paths],
                    "messages": _messages(conversation, strip=True),
                }
            )
            count += 1
            if len(rows) == _ROWS:
                write()
        write()
    return count


def _swift(conversations: Iterator[Conversation], out: Path, pictures: _Pictures) -> int:
    def rows() -> Iterator[dict[str, Any]]:
        for conversation in conversations:
            messages = _messages(conversation, strip=False)
            for message, turn in zip(messages, conversation.turns, strict=True):
                if turn.role == "assistant" and not turn.train:
                    message["loss"] = False
            yield {
                "messages": messages,
                "images": pictures.paths(conversation),
                "channel": conversation.source,
            }

    return _lines(out / "train.jsonl", rows())


def _llama_factory(conversations: Iterator[Conversation], out: Path, pictures: _Pictures) -> int:
    def rows() -> Iterator[dict[str, Any]]:
        for conversation in conversations:
            _all_learnt(conversation, "LLaMA-Factory")
            yield {
                "messages": _messages(conversation, strip=False),
                "images": pictures.paths(conversation),
            }

    count = _lines(out / "cogvlm_sft.jsonl", rows())
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


def _llava(conversations: Iterator[Conversation], out: Path, pictures: _Pictures) -> int:
    count = 0
    with (out / "train.json").open("wb") as stream:
        for conversation in conversations:
            if len(conversation.images) > 1:
                raise DataError(
                    f"{conversation.id}: {len(conversation.images)} pictures; LLaVA's format holds "
                    "one a record"
                )
            _markers_first(conversation, "LLaVA")
            _all_learnt(conversation, "LLaVA")
            row: dict[str, Any] = {"id": conversation.id}
            if conversation.images:
                row["image"] = pictures.paths(conversation)[0]
            row["conversations"] = [
                {"from": "human" if turn.role == "user" else "gpt", "value": turn.content}
                for turn in conversation.turns
            ]
            stream.write(b",\n" if count else b"[\n")
            stream.write(orjson.dumps(row))
            count += 1
        stream.write(b"\n]\n" if count else b"[]\n")
    return count


def _webdataset(conversations: Iterator[Conversation], out: Path, pictures: _Pictures) -> int:
    """Tar files of at most a gigabyte: `KEY.json` and `KEY.jpg`, `KEY.1.jpg` … of a sample.

    Only a sample that is larger itself has a larger file, of its own.
    """
    count = 0
    archive: tarfile.TarFile | None = None
    try:
        for conversation in conversations:
            record = conversation.to_record()
            members: list[tuple[str, bytes]] = []
            for place, relative in enumerate(conversation.images):
                ending, content = pictures.content(relative, conversation.id)
                members.append((f"{place}.{ending}" if place else ending, content))
            record["images"] = [name for name, _ in members]
            members.insert(0, ("json", orjson.dumps(record)))
            # each has a header, and ends on a block of 512 bytes; two blocks and a fill end a file
            size = sum(1024 + len(content) for _, content in members) + tarfile.RECORDSIZE
            if archive is None or (archive.offset and archive.offset + size > TAR_BYTES):
                if archive is not None:
                    archive.close()
                number = len(list(out.glob("train-*.tar")))
                archive = tarfile.open(out / f"train-{number:05d}.tar", "w")  # noqa: SIM115
            for name, content in members:
                member = tarfile.TarInfo(f"{count:09d}.{name}")  # no time, no owner: same bytes
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            count += 1
    finally:
        if archive is not None:
            archive.close()
    return count


_WRITERS: dict[str, Callable[[Iterator[Conversation], Path, _Pictures], int]] = {
    "trl": _trl,
    "llama-factory": _llama_factory,
    "ms-swift": _swift,
    "llava": _llava,
    "webdataset": _webdataset,
}
