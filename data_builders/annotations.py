"""Reads annotation files as a stream of record batches, whatever their size and JSON shape.

Arrays are cut by `json_array` at orjson's speed, JSON Lines are read line by line, and objects that
wrap an array or map ids to records go through ijson. A file that ends early or holds a syntax error
raises `DataError` with the byte; so does an array that turns out to be none, since reading nothing
from it would lose records without a word.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import orjson

from cogvlm_sft.errors import DataError
from data_builders.json_array import byte_of, decode, loads, read_array, why_of

CHUNK = 4 << 20
ROWS = 2000
_BOM = b"\xef\xbb\xbf"
_SPACE = b" \t\r\n"


@dataclass(slots=True)
class Batch:
    """Consecutive records of one file.

    Attributes:
        file: Base name of the file; ids and messages carry it.
        start: Index of the first record in the file.
        records: The decoded records.
        raw: The same records as JSON array text, cheaper to send to a worker; None where the
            records did not come from a plain array.
    """

    file: str
    start: int
    records: list[Any]
    raw: bytes | None = None
    size: int = 0


def require_file(path: Path, what: str = "annotation file") -> Path:
    """The path itself, if it is a file that can be read.

    Raises:
        DataError: It is missing, a folder, or empty.
    """
    if not path.exists():
        raise DataError(f"{path}: no such {what}; `cogvlm-sft data sources` lists what to fetch")
    if path.is_dir():
        raise DataError(f"{path}: is a folder, expected an {what}")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the {what} is empty (0 bytes); fetch it again")
    return path


def read_records(path: Path, wrappers: tuple[str, ...] = ()) -> Iterator[Batch]:
    """Batches of an array, of JSON Lines, or of an array inside an object.

    Args:
        path: The file.
        wrappers: Keys under which the data set is known to wrap its array.

    Raises:
        DataError: The file is missing, truncated (with the byte), or of another shape.
    """
    require_file(path)
    with path.open("rb") as stream:
        offset = _skip_space(stream)
        head = stream.read(1)
        if head == b"[":
            for start, records, raw in read_array(path, stream, offset + 1, CHUNK):
                yield Batch(path.name, start, records, raw)
            return
        stream.seek(offset)
        if head == b"{":
            if _is_lines(path, stream, offset):
                yield from _lines(path, stream, offset)
            else:
                yield from _wrapped(path, wrappers)
            return
    found = "nothing but white space" if not head else f"byte {head!r}"
    raise DataError(
        f"{path}: expected a JSON array, object or JSON Lines, found {found} at byte {offset}"
    )


def read_mapping(path: Path, under: str = "") -> Iterator[tuple[str, Any]]:
    """Key and value pairs of an object, streamed.

    Args:
        path: The file.
        under: Key of the object to walk; empty for the top level.

    Raises:
        DataError: The file is missing, truncated (with the byte), or not an object.
    """
    require_file(path)
    with path.open("rb") as stream:
        offset = _skip_space(stream)
        head = stream.read(1)
        if head != b"{":
            raise DataError(f"{path}: expected a JSON object at byte {offset}, found {head!r}")
        stream.seek(offset)
        try:
            yield from ijson.kvitems(stream, under, use_float=True)
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise _broken(path, stream, error) from None


def read_keyed(path: Path) -> Iterator[Batch]:
    """Batches of an object that maps ids to records, each as `{"id": key, "entry": value}`.

    Raises:
        DataError: As `read_mapping`.
    """
    pairs = read_mapping(path)
    start = 0
    while part := [{"id": key, "entry": entry} for key, entry in islice(pairs, ROWS)]:
        yield Batch(path.name, start, part)
        start += len(part)


def read_json(path: Path) -> Any:
    """A small JSON file as a whole.

    Raises:
        DataError: The file is missing, empty or truncated (with the byte).
    """
    raw = require_file(path).read_bytes()
    skipped = len(raw) - len(raw.removeprefix(_BOM))
    return decode(path, raw[skipped:], skipped)[0]


def read_head(path: Path, key: str) -> Any:
    """A top-level value that stands before the first array of an object; None if it is not there.

    Raises:
        DataError: The file is missing, or ends before that array.
    """
    require_file(path)
    with path.open("rb") as stream:
        stream.seek(_skip_space(stream))
        try:
            for prefix, event, value in ijson.parse(stream, use_float=True, multiple_values=True):
                if event == "start_array":
                    return None
                if prefix == key and event not in ("map_key", "start_map", "end_map"):
                    return value
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise _broken(path, stream, error) from None
    return None


def _skip_space(stream: BinaryIO) -> int:
    offset = 3 if stream.read(3) == _BOM else 0
    stream.seek(offset)
    while (byte := stream.read(1)) and byte in _SPACE:
        offset += 1
    stream.seek(offset)
    return offset


def _is_lines(path: Path, stream: BinaryIO, offset: int) -> bool:
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        return True
    first = stream.readline(1 << 20)
    following = stream.read(256).lstrip()
    stream.seek(offset)
    try:
        return isinstance(orjson.loads(first), dict) and following.startswith(b"{")
    except orjson.JSONDecodeError:
        return False


def _lines(path: Path, stream: BinaryIO, offset: int) -> Iterator[Batch]:
    records: list[Any] = []
    start = index = begin = 0
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                records.append(loads(line))
            except ValueError as error:
                raise DataError(
                    f"{path}:{number}: not valid JSON at byte {offset + byte_of(error)} "
                    f"({why_of(error)}); the line is broken or the file is truncated"
                ) from None
            index += 1
        offset += len(line)
        if len(records) == ROWS:
            yield Batch(path.name, start, records, size=offset - begin)
            records, start, begin = [], index, offset
    if records:
        yield Batch(path.name, start, records, size=offset - begin)


def _wrapped(path: Path, wrappers: tuple[str, ...]) -> Iterator[Batch]:
    for key in wrappers:
        records: list[Any] = []
        start = index = 0
        with path.open("rb") as stream:
            stream.seek(_skip_space(stream))
            try:
                for record in ijson.items(stream, f"{key}.item", use_float=True):
                    records.append(record)
                    index += 1
                    if len(records) == ROWS:
                        yield Batch(path.name, start, records)
                        records, start = [], index
            except (ijson.JSONError, UnicodeDecodeError) as error:
                raise _broken(path, stream, error) from None
        if records:
            yield Batch(path.name, start, records)
        if index:
            return
    keys = list(islice(_top_keys(path), 64))
    expected = " or ".join(["a JSON array", *(f'an object with "{key}"' for key in wrappers)])
    for key, kind in keys:
        if key in wrappers and kind == "start_array":
            return  # the array is there and empty
        if key in wrappers:
            raise DataError(f'{path}: expected an array under "{key}", found {kind}')
    names = [key for key, _ in keys]
    raise DataError(f"{path}: expected {expected}, found an object with keys {names}")


def _top_keys(path: Path) -> Iterator[tuple[str, str]]:
    """Keys of an object, each with the event that its value begins with."""
    with path.open("rb") as stream:
        stream.seek(_skip_space(stream))
        try:
            key = None
            for prefix, event, value in ijson.parse(stream):
                if key is not None:
                    yield key, event
                key = value if prefix == "" and event == "map_key" else None
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise _broken(path, stream, error) from None


def _broken(path: Path, stream: BinaryIO, error: Exception) -> DataError:
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    read, size = stream.tell(), path.stat().st_size
    if read == size:
        where = f"before byte {size}, where the file ends"
    else:  # ijson reads 64 KiB at a time
        where = f"between bytes {max(0, read - (64 << 10))} and {read}"
    return DataError(
        f"{path}: not valid JSON {where} ({why}); it is truncated or broken: fetch it again"
    )
