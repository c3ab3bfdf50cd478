"""A map-style dataset over weighted conversation files.

Only byte offsets are held in memory; a row is read, encoded and its pictures decoded when it is
asked for, in the data loader's workers. Notable choices: all records are validated and encoded once
before training (`preflight`), so that a bad record ends the run before its first step and a row is
a fixed (conversation, part) pair; a weight repeats a source in every epoch (2.0 is twice, 0.3 is a
seeded 30 %, 1.5 is once and a seeded half), so an epoch is finite and the same on every rank.
"""

import json
import random
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from cogvlm_sft.conversation import (
    Conversation,
    conversation_files,
    parse_conversation,
    read_conversations,
    resolve_image,
)
from cogvlm_sft.data.encode import EncodeResult, LossOn, encode_conversation
from cogvlm_sft.data.pictures import check_picture, read_picture
from cogvlm_sft.errors import DataError
from cogvlm_sft.model.processing_cogvlm import CogVLMProcessor

# What is known of each row, and the rows of an epoch: type codes of `array`.
_COLUMNS = {
    "file": "i",
    "offset": "q",
    "line": "q",
    "part": "i",
    "tokens": "i",
    "leading": "q",
    "rows": "q",
}


@dataclass(slots=True)
class SourceReport:
    """What one source gives.

    Attributes:
        path: File or build folder.
        weight: How often an epoch holds it.
        conversations: Records read.
        rows: Training rows of one pass; a split conversation gives several.
        split: Conversations that became more than one row.
        dropped: Conversations of which nothing fits into `max_length`.
        dropped_rounds: Single rounds that do not fit, of all conversations.
        unsupervised_ends: Earlier answers whose EOS has no place (see `encode`).
        tokens: Of one pass, pictures included.
        supervised: Tokens of one pass that carry loss.
    """

    path: str
    weight: float
    conversations: int = 0
    rows: int = 0
    split: int = 0
    dropped: int = 0
    dropped_rounds: int = 0
    unsupervised_ends: int = 0
    tokens: int = 0
    supervised: int = 0

    def count(self, result: EncodeResult) -> None:
        """Adds one conversation."""
        self.conversations += 1
        self.rows += len(result.parts)
        self.split += len(result.parts) > 1
        self.dropped += not result.parts
        self.dropped_rounds += result.dropped_rounds
        self.unsupervised_ends += result.unsupervised_ends
        self.tokens += sum(len(part.input_ids) for part in result.parts)
        self.supervised += sum(part.supervised for part in result.parts)


@dataclass(slots=True)
class DatasetReport:
    """What a data set holds; `str()` is the table that training prints.

    Attributes:
        sources: One entry a source.
        rows: Rows of an epoch, weights applied.
    """

    sources: list[SourceReport] = field(default_factory=list)
    rows: int = 0

    @property
    def conversations(self) -> int:
        """Records read, before weights."""
        return sum(source.conversations for source in self.sources)

    @property
    def dropped(self) -> int:
        """Conversations that fit nowhere, before weights."""
        return sum(source.dropped for source in self.sources)

    def __str__(self) -> str:
        head = (
            f"{'source':40} {'weight':>6} {'conversations':>13} {'rows':>9} {'split':>7} "
            f"{'dropped':>7} {'tokens':>12} {'supervised':>12}"
        )
        lines = [
            f"{source.path[-40:]:40} {source.weight:6g} {source.conversations:13,} "
            f"{source.rows:9,} {source.split:7,} {source.dropped:7,} {source.tokens:12,} "
            f"{source.supervised:12,}"
            for source in self.sources
        ]
        lines.append(f"an epoch has {self.rows:,} rows")
        ends = sum(source.unsupervised_ends for source in self.sources)
        if ends:
            lines.append(f"{ends:,} inner answers end without EOS: the tokenizer merges their end")
        rounds = sum(source.dropped_rounds for source in self.sources)
        if rounds:
            lines.append(f"{rounds:,} rounds are longer than max_length and left out")
        return "\n".join([head, *lines])


class ConversationDataset(Dataset[dict[str, Any]]):
    """Encoded conversations, one row an item.

    An item holds `input_ids`, `token_type_ids` and `labels` (lists), `pictures` (the paths of its
    pictures) and `images`, their pixel values (pictures, 3, S, S). Items that are asked for
    together decode a picture once.

    Args:
        sources: (file or build folder, weight) pairs.
        processor: Encodes text and pictures.
        image_root: What image paths are relative to.
        max_length: Most tokens of a row.
        loss_on: `all` or `last`.
        seed: Chooses the subset of a fractional weight.
        reduced_decode: Decode large JPEGs at reduced scale (see `read_picture`).
        index: `index` of a data set of the same arguments and files; nothing is read again then.

    Raises:
        DataError: At the first bad record, naming file and line; see `preflight`.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str | Path, float]],
        processor: CogVLMProcessor,
        image_root: str | Path = ".",
        max_length: int | None = None,
        loss_on: LossOn = "all",
        seed: int = 0,
        reduced_decode: bool = False,
        index: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        if not sources:
            raise DataError("data.train names no source; give at least one path")
        for path, weight in sources:
            if weight <= 0:
                raise DataError(f"{path}: weight is {weight}, expected a positive number")
        self.sources = [(Path(path), float(weight)) for path, weight in sources]
        self.processor = processor
        self.image_root = Path(image_root)
        self.max_length = max_length
        self.loss_on = loss_on
        self.seed = seed
        self.reduced_decode = reduced_decode
        self._files: list[Path] = []
        # One entry a row of a single pass: file, byte offset, line number, part.
        self._file, self._offset = array("i"), array("q")
        self._line, self._part = array("q"), array("i")
        self._tokens = array("i")
        # The picture that a row begins with, numbered; -1 without one.
        self._leading = array("q")
        # One entry a row of an epoch.
        self._rows = array("q")
        self._report: DatasetReport | None = None
        if index is not None:
            self._restore(index)
        self.preflight()

    @property
    def report(self) -> DatasetReport:
        """Counts of conversations, rows and drops."""
        return self.preflight()

    @property
    def index(self) -> dict[str, np.ndarray]:
        """What `preflight` found: a column an array, and `facts`, JSON in bytes."""
        facts = {"files": [str(file) for file in self._files], "report": asdict(self.report)}
        columns = {f"_{name}": np.asarray(getattr(self, f"_{name}")) for name in _COLUMNS}
        return columns | {"facts": np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)}

    def _restore(self, index: Mapping[str, np.ndarray]) -> None:
        for name, code in _COLUMNS.items():
            setattr(self, f"_{name}", array(code, index[f"_{name}"].tobytes()))
        facts = json.loads(index["facts"].tobytes())
        self._files = [Path(file) for file in facts["files"]]
        sources = [SourceReport(**source) for source in facts["report"]["sources"]]
        self._report = DatasetReport(sources, facts["report"]["rows"])

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, pictures included."""
        return [self._tokens[row] for row in self._rows]

    @property
    def leading_pictures(self) -> list[int]:
        """For each row the number of the picture that it begins with, -1 without one."""
        return [self._leading[row] for row in self._rows]

    def preflight(self) -> DatasetReport:
        """Validates and encodes every record once; later calls return the same report.

        Raises:
            DataError: A record that is not valid, an image that is missing, cut off or outside the
                image root, a conversation without an answer to learn, `max_length` below an image's
                length, or no row at all; always with file and line.
        """
        if self._report is not None:
            return self._report
        report, checked = DatasetReport(), dict[str, int]()
        for index, (path, weight) in enumerate(self.sources):
            source = SourceReport(str(path), weight)
            first = len(self._file)
            for file in conversation_files(path):
                self._scan(file, source, checked)
            self._rows.extend(_repeat(range(first, len(self._file)), weight, self.seed, index))
            report.sources.append(source)
        report.rows = len(self._rows)
        if not report.rows:
            raise DataError(
                f"{', '.join(str(path) for path, _ in self.sources)}: no row to train on; "
                f"{report.conversations} conversation(s) read, {report.dropped} over max_length "
                f"{self.max_length}"
            )
        self._report = report
        return report

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The items of a micro-batch; torch's loader asks for all of them at once."""
        decoded: dict[str, torch.Tensor] = {}
        return [self._item(index, decoded) for index in indices]

    def _item(self, index: int, decoded: dict[str, torch.Tensor]) -> dict[str, Any]:
        row = self._rows[index]
        conversation, where = self.conversation(index)
        part = self._encode(conversation, where).parts[self._part[row]]
        for path in part.images:
            if path not in decoded:
                file = resolve_image(self.image_root, path, where)
                decoded[path] = self._pixels(file, where)
        size = self.processor.image_processor.size
        none = torch.zeros(0, 3, size["height"], size["width"])
        return {
            "input_ids": part.input_ids,
            "token_type_ids": part.token_type_ids,
            "labels": part.labels,
            "pictures": part.images,
            "images": torch.cat([none, *(decoded[path] for path in part.images)]),
        }

    def _pixels(self, file: Path, where: str) -> torch.Tensor:
        """(1, 3, S, S) of a picture file."""
        side = self.processor.image_processor.size["height"] if self.reduced_decode else None
        picture = read_picture(file, where, side)
        return self.processor.image_processor(picture, return_tensors="pt")["pixel_values"]

    def conversation(self, index: int) -> tuple[Conversation, str]:
        """The conversation of a row, and where it stands ("file:line (id)")."""
        row = self._rows[index]
        file = self._files[self._file[row]]
        with file.open("rb") as stream:
            stream.seek(self._offset[row])
            line = stream.readline()
        where = f"{file}:{self._line[row]}"
        conversation = parse_conversation(line, where)
        return conversation, f"{where} ({conversation.id})"

    def _scan(self, file: Path, source: SourceReport, checked: dict[str, int]) -> None:
        """Reads one file; `checked` numbers the pictures that were looked at."""
        number = len(self._files)
        self._files.append(file)
        offset = 0
        with (
            file.open("rb") as stream,
            tqdm(
                total=file.stat().st_size, unit="B", unit_scale=True, desc=file.name, disable=None
            ) as progress,
        ):
            for line_number, line in enumerate(stream, start=1):
                if line.strip():
                    where = f"{file}:{line_number}"
                    conversation = parse_conversation(line, where)
                    where = f"{where} ({conversation.id})"
                    for path in conversation.images:
                        if path not in checked:
                            self._check_picture(path, where)
                            checked[path] = len(checked)
                    result = self._encode(conversation, where)
                    source.count(result)
                    for part, encoded in enumerate(result.parts):
                        self._file.append(number)
                        self._offset.append(offset)
                        self._line.append(line_number)
                        self._part.append(part)
                        self._tokens.append(len(encoded.input_ids))
                        leads = bool(encoded.images) and encoded.token_type_ids[1] == 1
                        self._leading.append(checked[encoded.images[0]] if leads else -1)
                offset += len(line)
                progress.update(len(line))

    def _check_picture(self, path: str, where: str) -> None:
        try:
            check_picture(resolve_image(self.image_root, path, where), where)
        except DataError as error:
            if (self.image_root / path).is_file():
                raise
            raise DataError(f"{error}{self._shortage()}") from None

    def _shortage(self) -> str:
        """How many pictures are missing in all, where it is more than one."""
        wanted = {
            image
            for path, _ in self.sources
            for conversation in read_conversations(path)
            for image in conversation.images
        }
        missing = sum(not (self.image_root / image).is_file() for image in wanted)
        return f" ({missing:,} of {len(wanted):,} pictures are missing)" if missing > 1 else ""

    def _encode(self, conversation: Conversation, where: str) -> EncodeResult:
        try:
            return encode_conversation(conversation, self.processor, self.max_length, self.loss_on)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None


def _repeat(rows: range, weight: float, seed: int, index: int) -> list[int]:
    """The rows of one source in an epoch: whole passes, then a seeded part of one."""
    whole = int(weight)
    part = round((weight - whole) * len(rows))
    chosen = random.Random(f"{seed}:{index}").sample(rows, part)
    return [*rows] * whole + sorted(chosen)
