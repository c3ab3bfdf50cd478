"""Reads annotation files as a stream of record batches, whatever their size and JSON shape.

Arrays are cut by `json_array` at orjson's speed, JSON Lines are read line by line, and objects that
wrap an array or map ids to records go through ijson, or where they hold what ijson refuses, through
`json_object`. A file that ends early or holds a syntax error raises `DataError` with the byte; so
does an array that turns out to be none, since reading nothing from it would lose records without a
word.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from cogvlm_sft.errors import DataError
from data_builders.json_array import byte_of, decode, loads, read_array, why_of
from data_builders.json_object import LoneSurrogates, WholePairs, read_pairs

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
        size: Bytes of the file that were read for them, where that is known.
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


def read_records(
    path: Path, wrappers: tuple[str, ...] = (), needed: bool = True
) -> Iterator[Batch]:
    """Batches of an array, of JSON Lines, or of an array inside an object.

    Args:
        path: The file.
        wrappers: Keys under which the data set is known to wrap its array.
        needed: Whether an object must have one of them.

    Raises:
        DataError: The file is missing, truncated (with the byte), or of another shape.
    """
    require_file(path)
    with path.open("rb") as stream:
        offset = _skip_space(stream)
        head = stream.read(1)
        stream.seek(offset)
        if _is_lines(path, stream, offset):
            yield from _lines(path, stream, offset)
            return
        if head == b"[":
            stream.seek(offset + 1)
            for start, records, raw in read_array(path, stream, offset + 1, CHUNK):
                yield Batch(path.name, start, records, raw)
            return
        if head == b"{":
            yield from _wrapped(path, wrappers, needed)
            return
    found = "nothing but white space" if not head else f"byte {head!r}"
    raise DataError(
        f"{path}: expected a JSON array, object or JSON Lines, found {found} at byte {offset}"
    )


def read_mapping(path: Path) -> Iterator[tuple[str, Any]]:
    """Key and value pairs of an object, streamed; a key that stands there twice comes twice.

    Raises:
        DataError: The file is missing, truncated (with the byte), or not an object.
    """
    require_file(path)
    with path.open("rb") as stream:
        offset = _skip_space(stream)
        head = stream.read(1)
    if head != b"{":
        raise DataError(f"{path}: expected a JSON object at byte {offset}, found {head!r}")
    yield from _streamed(path, lambda stream: ijson.kvitems(stream, "", use_float=True), list)


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


def read_head(path: Path, key: str, whole: bool = False) -> Any:
    """A top-level text or number of an object; None if it is not there.

    Args:
        path: The file.
        key: Its key.
        whole: Whether to look behind the first array too, which takes as long as reading it.

    Raises:
        DataError: The file is missing or broken.
    """

    def found(stream: Any) -> Iterator[Any]:
        for prefix, event, value in ijson.parse(stream, use_float=True):
            if event == "start_array" and not whole:
                return
            if prefix == key and event in ("string", "number", "boolean"):
                yield value

    def of(pairs: WholePairs) -> list[Any]:
        return [value for name, value in pairs if name == key]

    return next(_streamed(path, found, of), None)


def _skip_space(stream: BinaryIO) -> int:
    offset = 3 if stream.read(3) == _BOM else 0
    stream.seek(offset)
    while (byte := stream.read(1)) and byte in _SPACE:
        offset += 1
    stream.seek(offset)
    return offset


def _is_lines(path: Path, stream: BinaryIO, offset: int) -> bool:
    """Whether every line is a record: by the file's name, else by its first two lines.

    A file called so may still be an array; its first line then is no value, or there is no other.
    """
    first = stream.readline(1 << 20)
    following = stream.read(256).lstrip()
    stream.seek(offset)
    called = path.suffix.lower() in (".jsonl", ".ndjson")
    try:
        value = loads(first)
    except ValueError:
        return called and first != b"" and not first.startswith(b"[")
    if called:
        return bool(following) or type(value) is not list
    return type(value) is dict and following.startswith(b"{")


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


def _wrapped(path: Path, wrappers: tuple[str, ...], needed: bool) -> Iterator[Batch]:
    for key in wrappers:

        def items(stream: Any, key: str = key) -> Iterator[Any]:
            return ijson.items(stream, f"{key}.item", use_float=True)

        def of(pairs: WholePairs, key: str = key) -> Iterator[Any]:
            lists = (value for name, value in pairs if name == key and type(value) is list)
            return chain.from_iterable(lists)

        records = _streamed(path, items, of)
        start = 0
        while part := list(islice(records, ROWS)):
            yield Batch(path.name, start, part)
            start += len(part)
        if start:
            return
    keys = list(islice(_top_keys(path), 64))
    expected = " or ".join(["a JSON array", *(f'an object with "{key}"' for key in wrappers)])
    for key, kind in keys:
        if key in wrappers and kind == "start_array":
            return  # the array is there and empty
        if key in wrappers:
            raise DataError(f'{path}: expected an array under "{key}", found {kind}')
    if needed:
        names = [key for key, _ in keys]
        raise DataError(f"{path}: expected {expected}, found an object with keys {names}")


def _streamed(
    path: Path,
    events: Callable[[Any], Iterator[Any]],
    whole: Callable[[WholePairs], Iterator[Any] | list[Any]],
) -> Iterator[Any]:
    """What ijson finds in an object; where it stops at an odd value, the rest by `read_pairs`.

    Args:
        path: The file.
        events: Finds it in a stream.
        whole: Finds it in the pairs of the whole object, in the same order.

    Raises:
        DataError: The file is truncated or broken, with the byte.
    """
    given = 0
    with require_file(path).open("rb") as stream:
        stream.seek(_skip_space(stream))
        try:
            for item in events(LoneSurrogates(stream)):
                given += 1
                yield item
            return
        except (ijson.JSONError, UnicodeDecodeError) as error:
            broken = _broken(path, stream, error)
            if "premature EOF" in str(error):
                raise broken from None
    yield from islice(whole(read_pairs(path, broken)), given, None)


def _top_keys(path: Path) -> Iterator[tuple[str, str]]:
    """Keys of an object, each with the event that its value begins with."""

    def found(stream: Any) -> Iterator[tuple[str, str]]:
        key = None
        for prefix, event, value in ijson.parse(stream):
            if key is not None:
                yield key, event
            key = value if prefix == "" and event == "map_key" else None

    def of(pairs: WholePairs) -> Iterator[tuple[str, str]]:
        for key, value in pairs:
            yield key, "start_array" if type(value) is list else type(value).__name__

    return _streamed(path, found, of)


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
