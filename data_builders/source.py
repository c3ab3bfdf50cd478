"""What a source is, and the one function that turns its records into lines of a build.

A source reads batches of raw records (streaming) and drafts each: texts and picture names, or the
reason to drop it. `RecordStage` does the rest for every source alike and is a pure function of the
batch, so it runs in any process: ids, picture paths, the final JSON line, and the hashes that later
stages sort and compare by. The unit that is counted is the raw record: in = kept + dropped. Records
stay plain dicts on this path; validation of the result is `data verify`.
"""

import importlib
import zlib
from abc import ABC, abstractmethod
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar

import orjson

from cogvlm_sft.errors import DataError
from data_builders.annotations import Batch, read_keyed, read_records
from data_builders.clean import flags_of, has_alien, rounds, text_of
from data_builders.images import ImageFinder
from data_builders.published import File, Folder
from data_builders.recipe import SourceEntry, Strict, options

EXAMPLES = 20


@dataclass(slots=True)
class Draft:
    """A record as a source understands it.

    Attributes:
        turns: Question, answer, question, answer …, clean and without picture markers.
        images: Picture names as the data set has them.
        style: Prompt style.
        orig_id: The data set's own id.
        meta: Further facts for the record.
    """

    turns: list[str]
    images: list[str]
    style: str
    orig_id: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


class NoOptions(Strict):
    """A source without options of its own."""


class Source(ABC):
    """A data set: what to fetch, how to read it, what a record of it means.

    Subclasses set the class attributes and override `draft`, and `batches` where their files are
    not plain arrays.

    Attributes:
        entry: The source's part of the recipe.
        options: Its own options.
        default_style: Prompt style of its conversations.
        file: Base name of the file that the records being drafted come from.
        limit: An answer in lower case, and the largest share of the source's conversations in the
            build that may end in it; None limits nothing.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    license: ClassVar[str]
    commercial: ClassVar[bool] = True
    home: ClassVar[str] = ""
    files: ClassVar[tuple[File, ...]] = ()
    image_folders: ClassVar[tuple[Folder, ...]] = ()
    wrappers: ClassVar[tuple[str, ...]] = ("annotations", "data")
    keyed: ClassVar[bool] = False
    style: ClassVar[str] = "chat"
    needs_annotations: ClassVar[bool] = True
    reads_folders: ClassVar[bool] = False
    Options: ClassVar[type[Strict]] = NoOptions

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.files:  # its docstring tells what to fetch, from the same lines as `data sources`
            cls.__doc__ = f"{cls.__doc__ or cls.title}\n\n{cls.what_to_fetch()}"

    @classmethod
    def what_to_fetch(cls) -> str:
        """The files to fetch, their sizes, the licence and the picture folders, as text."""
        use = "" if cls.commercial else " (non-commercial)"
        lines = [f"Licence: {cls.license}{use}", *(f"From: {p}" for p in cls.home.split("; ") if p)]
        lines += [
            f"File: {', '.join(filter(None, (file.name, file.size_in_words(), file.note)))}"
            for file in cls.files
        ]
        lines += [f"Pictures: {folder.name}/, {folder.note}" for folder in cls.image_folders]
        return "\n".join(lines)

    def __init__(self, entry: SourceEntry) -> None:
        self.entry = entry
        self.options: Any = options(entry)
        self.default_style: str = entry.style or self.style
        self.file = ""
        self.limit: tuple[str, float] | None = None

    def inputs(self) -> list[Path]:
        """The files whose hashes the manifest records, in an order free of how they were listed.

        Raises:
            DataError: None is given though the source needs one.
        """
        if self.needs_annotations and not self.entry.annotations:
            names = ", ".join(file.name for file in self.files) or "an annotation file"
            raise DataError(f"source {self.entry.name}: no annotations given; it reads {names}")
        return sorted(set(self.entry.annotations), key=lambda path: (path.name, str(path)))

    def unpack_pictures(self) -> list[Path]:
        """Writes out pictures that the annotation files themselves hold; returns their folders."""
        return []

    def batches(self, finder: ImageFinder) -> Iterator[Batch]:
        """Raw records in batches: the items of a list, or if `keyed` the entries of an object."""
        for path in self.inputs():
            yield from read_keyed(path) if self.keyed else read_records(path, self.wrappers)

    @abstractmethod
    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one raw record.

        Args:
            record: Any JSON value.
            notes: Repairs are counted here.

        Returns:
            The draft, or the name of the reason to drop the record.
        """

    def short(
        self, question: Any, answer: Any, image: Any, notes: Counter[str], **facts: Any
    ) -> Draft | str:
        """A draft of one question and its answer, or the reason to drop it.

        Args:
            question, answer: Texts; an answer may be a number.
            image: Name of the picture.
            notes: Repairs are counted here.
            facts: Further fields of the `Draft`, such as `orig_id`.
        """
        if type(question) is not str:
            return "empty_question" if question is None else "question_not_a_text"
        text = text_of(answer)
        if text is None:
            return "empty_answer" if answer is None else "answer_not_a_text"
        if type(image) is not str or not image.strip():
            missing = image is None or type(image) is str
            return "image_name_missing" if missing else "image_name_not_a_string"
        turns = rounds([question, text], notes)
        if type(turns) is str:
            return turns
        assert isinstance(turns, list)
        return Draft(turns, [image], facts.pop("style", self.default_style), **facts)

    def units(self, record: Any) -> int:
        """How many rows of the files a raw record stands for: several where rows are joined."""
        return 1


@dataclass(slots=True)
class Drop:
    """A dropped record: reason, file, index and the beginning of its content."""

    reason: str
    file: str
    index: int
    excerpt: str


@dataclass(slots=True)
class Processed:
    """What a batch became; the arrays run over the kept records.

    Attributes:
        lines: The JSON lines, joined.
        lengths: Bytes of each line, with its newline.
        keys: 64-bit sort key of each record: hash(seed, id).
        texts: 64-bit hash of each record's texts.
        exact: 64-bit hash of each record's texts and picture paths.
        pairs: Questions of each record.
        answer_chars: Characters of all answers of each record.
        units: Raw records of each record.
        images: Paths of each record's pictures.
        notes: Repairs.
        drops: Raw records dropped, by reason.
        examples: The first few drops of each reason.
        read: Raw records of the batch.
    """

    lines: bytes
    lengths: array
    keys: array
    texts: array
    exact: array
    pairs: array
    answer_chars: array
    units: array
    images: list[tuple[str, ...]]
    notes: Counter[str]
    drops: Counter[str]
    examples: list[Drop]
    read: int


class RecordStage:
    """Turns batches of one source into lines. A pure function of the batch."""

    def __init__(self, source: Source, finder: ImageFinder, seed: int) -> None:
        self.source = source
        self.finder = finder
        self.seed = str(seed).encode()

    def run(self, batch: Batch) -> Processed:
        """Processes a batch; see `Processed`."""
        records = orjson.loads(batch.raw) if batch.raw is not None else batch.records
        source, find = self.source, self.finder.find
        source.file = batch.file
        name, draft_of, units_of = source.entry.name, source.draft, source.units
        licence = source.license
        file_hash = zlib.crc32(batch.file.encode("utf-8", "surrogateescape"))
        out = Processed(
            b"", array("I"), array("Q"), array("Q"), array("Q"), array("I"), array("I"),
            array("I"), [], Counter(), Counter(), [], 0,
        )  # fmt: skip
        lines: list[bytes] = []
        for index, record in enumerate(records, start=batch.start):
            draft = draft_of(record, out.notes)
            if type(draft) is str:
                self._drop(out, draft, batch.file, index, record)
                continue
            assert isinstance(draft, Draft)
            paths: list[str] = []
            reason = ""
            for image in draft.images:
                path, reason = find(image)
                if path is None:
                    break
                paths.append(path)
            if reason:
                self._drop(out, reason, batch.file, index, record)
                continue
            turns = draft.turns
            joined = "\x1f".join(turns)
            try:
                digest = blake2b(joined.encode(), digest_size=12).digest()
                named = blake2b("\x1f".join(paths).encode(), digest_size=8, key=digest).digest()
            except UnicodeEncodeError:
                self._drop(out, "text_not_unicode", batch.file, index, record)
                continue
            if "\0" in joined and has_alien(joined):
                self._drop(out, "text_not_unicode", batch.file, index, record)
                continue
            exact = int.from_bytes(named, "big")
            short = (exact & 0xFFFFFFFF) ^ file_hash
            identity = f"{name}:{index:06d}:{short:08x}"
            messages = [
                {"role": "assistant" if place & 1 else "user", "content": text}
                for place, text in enumerate(turns)
            ]
            if paths:
                markers = "<image>\n" * len(paths)
                messages[0]["content"] = markers + turns[0] if turns[0] else markers[:-1]
            meta: dict[str, Any] = {
                "license": licence, "orig_file": batch.file, "orig_index": index,
            }  # fmt: skip
            if draft.orig_id is not None:
                meta["orig_id"] = draft.orig_id
            if draft.meta:
                meta.update(draft.meta)
            flags = flags_of("\n".join(turns[1::2]))
            if flags:
                meta["flags"] = flags
                out.notes.update(f"flagged_{flag}" for flag in flags)
            try:
                line = orjson.dumps(
                    {
                        "id": identity,
                        "source": name,
                        "style": draft.style if paths else "text",
                        "images": paths,
                        "messages": messages,
                        "meta": meta,
                    },
                    option=orjson.OPT_APPEND_NEWLINE,
                )
            except (TypeError, ValueError):  # an orig_id with half a surrogate pair
                self._drop(out, "text_not_unicode", batch.file, index, record)
                continue
            lines.append(line)
            out.lengths.append(len(line))
            key = blake2b(identity.encode(), digest_size=8, key=self.seed).digest()
            out.keys.append(int.from_bytes(key, "big"))
            out.texts.append(int.from_bytes(digest[:8], "big"))
            out.exact.append(exact)
            out.pairs.append(len(turns) >> 1)
            out.answer_chars.append(sum(map(len, turns[1::2])))
            units = units_of(record)
            out.units.append(units)
            out.images.append(tuple(paths))
            out.read += units
        out.lines = b"".join(lines)
        return out

    def _drop(self, out: Processed, reason: str, file: str, index: int, record: Any) -> None:
        units = self.source.units(record)
        if sum(example.reason == reason for example in out.examples) < EXAMPLES:
            out.examples.append(Drop(reason, file, index, excerpt(record)))
        out.drops[reason] += units
        out.read += units


def excerpt(record: Any, length: int = 240) -> str:
    """The beginning of a record as text that can be shown."""
    try:
        text = orjson.dumps(record, default=str).decode()
    except (TypeError, ValueError):  # half a surrogate pair, or nested deeply
        try:
            text = repr(record)
        except (RecursionError, ValueError):  # ValueError: a number of thousands of digits
            text = "(too deep or too large to show)"
    return text if len(text) <= length else text[:length] + "…"


def load_source(name: str) -> type[Source]:
    """The class of a source, by module name."""
    return importlib.import_module(f"data_builders.sources.{name}").SOURCE
