"""Cuts a JSON array of any size at its record boundaries, at orjson's speed.

Notable choice: a boundary is *proved*, not guessed. A prefix of the array that ends in `}` before
`,{` is parsed by orjson with the array closed behind it; JSON is deterministic from left to right,
so a prefix that parses is a true boundary. One buffer is in memory, and an event parser would cost
ten times as much. Where no such prefix parses, structure alone finds the last comma outside every
bracket.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from cogvlm_sft.errors import DataError

_LONGEST_RECORD = 256 << 20
_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*"|["{}\[\],]', re.DOTALL)


def read_array(
    path: Path, stream: BinaryIO, base: int, chunk_size: int
) -> Iterator[tuple[int, list[Any], bytes | None]]:
    """Runs of items of a top-level array.

    Args:
        path: For messages.
        stream: Stands behind the array's `[`.
        base: Bytes of the file before that place.
        chunk_size: Bytes read at a time.

    Yields:
        The index of the first item, the items, and their text as an array; no text where orjson
        could not read them.

    Raises:
        DataError: The array is broken, ends early (with the byte), or is followed by anything.
    """
    buffer = b""
    index = 0
    step = chunk_size
    stop: re.Pattern[bytes] | None = None
    while True:
        chunk = stream.read(step)
        buffer += chunk
        if not chunk:
            records, raw = _rest(path, buffer, base)
            if records:
                yield index, records, raw
            return
        if stop is None:
            stop = _separator(buffer)
        cut = _boundary(path, buffer, base, stop)
        if cut is None:
            if len(buffer) > _LONGEST_RECORD:
                raise DataError(
                    f"{path}: no record ends within {len(buffer)} bytes of byte {base}; "
                    "a quote is missing, or this is not a list of records"
                )
            step = len(buffer)  # doubles, so that rescanning stays linear
            continue
        end, records, raw = cut
        yield index, records, raw
        index += len(records)
        comma = buffer.index(b",", end) + 1
        base += comma
        buffer = buffer[comma:]
        step = chunk_size


def _separator(buffer: bytes) -> re.Pattern[bytes]:
    """What stands between records: `}`, comma, `{` and the first key of the first record."""
    first = re.match(rb'\s*\{\s*("(?:[^"\\]|\\.)*")', buffer)
    key = re.escape(first.group(1)) if first else b""
    return re.compile(rb"\}\s*,\s*\{\s*" + key)


def _boundary(
    path: Path, buffer: bytes, base: int, stop: re.Pattern[bytes]
) -> tuple[int, list[Any], bytes | None] | None:
    """The last record boundary in the buffer, with the records before it."""
    for window in (1 << 16, 1 << 20):
        candidates = [m.start() + 1 for m in stop.finditer(buffer, max(0, len(buffer) - window))]
        for end in reversed(candidates[-4:]):
            raw = b"[" + buffer[:end] + b"]"
            try:
                return end, orjson.loads(raw), raw
            except orjson.JSONDecodeError:
                continue
        if candidates or window >= len(buffer):
            break
    cut = _scan(buffer)
    if cut is None:
        return None
    raw = b"[" + buffer[:cut] + b"]"
    return cut, *decode(path, raw, base - 1)


def _scan(buffer: bytes) -> int | None:
    """The last record end that structure alone shows: a comma outside every bracket."""
    depth, last = 0, None
    for match in _STRUCTURE.finditer(buffer):
        byte = match.group()
        if byte == b'"':  # a string that goes on behind the buffer
            break
        if byte in b"{[":
            depth += 1
        elif byte in b"}]":
            depth -= 1
            if depth < 0:  # the array ends here: what follows is judged by the final parse
                return None
        elif byte == b"," and depth == 0:
            last = match.start()
    return last


def _rest(path: Path, buffer: bytes, base: int) -> tuple[list[Any], bytes | None]:
    raw = b"[" + buffer.rstrip()
    if raw.endswith(b"]"):
        return decode(path, raw, base - 1)
    cut = _scan(buffer)
    begin = base + (cut + 1 if cut is not None else 0)
    if cut is not None:
        decode(path, b"[" + buffer[:cut] + b"]", base - 1)  # an earlier error is the true one
    raise DataError(
        f"{path}: the file ends at byte {base + len(buffer)}, inside the record that begins at "
        f"byte {begin}; it is truncated: fetch it again"
    )


def decode(path: Path, raw: bytes, base: int) -> tuple[list[Any], bytes | None]:
    """Decodes array text that begins at byte `base` of the file."""
    try:
        return orjson.loads(raw), raw
    except orjson.JSONDecodeError:
        pass
    try:
        # json reads what orjson refuses though it harms nobody here: lone surrogates, raw control
        # characters, NaN. Such records are judged one by one later.
        return loads(raw), None
    except ValueError as error:
        raise DataError(
            f"{path}: not valid JSON at byte {base + byte_of(error)} ({why_of(error)}); "
            "the file is broken or truncated: fetch it again"
        ) from None


def loads(raw: bytes) -> Any:
    """One JSON value, by `json` where orjson refuses what harms nobody here.

    Raises:
        ValueError: It is none; see `byte_of` and `why_of`.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        try:
            return json.loads(raw.decode("utf-8"), strict=False, parse_int=integer)
        except RecursionError:
            raise ValueError("nested too deeply") from None


def integer(digits: str) -> float:
    """A whole number; infinity where Python would refuse to read so many digits."""
    return int(digits) if len(digits) < 4000 else float("inf")


def byte_of(error: ValueError) -> int:
    """The byte of the decoded text at which an error of `loads` stands."""
    if isinstance(error, json.JSONDecodeError):
        return len(error.doc[: error.pos].encode("utf-8", "surrogatepass"))
    return error.start if isinstance(error, UnicodeDecodeError) else 0


def why_of(error: ValueError) -> str:
    """What an error of `loads` says, without the place."""
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)
