"""What ijson gets wrong about the JSON that released files hold, put right.

Python writes NaN, Infinity, numbers of any length and raw control characters into JSON, and ijson's
C parser refuses them; such a file is decoded as a whole by `json`, as arrays are, so that the odd
record is dropped by name and the others stay. Half a surrogate pair it turns into `?` without a
word; here it becomes a NUL, for which the record that holds it is dropped.
"""

import json
import re
from pathlib import Path
from typing import Any, BinaryIO

from cogvlm_sft.errors import DataError
from data_builders.json_array import byte_of, integer, why_of

WholePairs = list[tuple[str, Any]]

_LARGEST = 512 << 20  # decoded, a file takes up to ten times its size
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_HIGH = re.compile(rb"\\u[dD][89aAbB][0-9a-fA-F]{2}")
# every escape, so that the backslash of `\\ud83d` (a text about escapes) is told from a real one
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89aAbB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(?P<lone>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
_PAIR = 12  # bytes of an escaped pair


class LoneSurrogates:
    """A stream of JSON text whose halves of surrogate pairs become `\\u0000`, byte for byte."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._held = b""  # begins with an escape that the next bytes may complete

    def read(self, size: int = 65536) -> bytes:
        """Some bytes, none at the end; ijson calls it."""
        while True:
            fresh = self._stream.read(size)
            text = self._held + fresh
            end = _between_escapes(text) if fresh else len(text)
            given, self._held = text[:end], text[end:]
            if _SURROGATE.search(given):
                given = _ESCAPE.sub(lambda m: rb"\u0000" if m["lone"] else m[0], given)
            if given or not fresh:
                return given


def _between_escapes(text: bytes) -> int:
    """A place near the end of JSON text that no escape and no pair of escapes spans."""
    place = text.find(b"\\", max(0, len(text) - _PAIR))
    if place < 0:
        return len(text)
    if _HIGH.fullmatch(text, max(0, place - 6), place):
        place -= 6
    run = place - len(text[:place].rstrip(b"\\"))
    return place - run % 2  # the second of two backslashes begins nothing


def read_pairs(path: Path, broken: DataError) -> WholePairs:
    """Keys and values of an object that ijson does not read, keys that occur twice among them.

    Args:
        path: The file.
        broken: What to raise where the file is too large for this.

    Raises:
        DataError: It is too large, no object, or not JSON, with the byte.
    """
    if path.stat().st_size > _LARGEST:
        raise broken
    raw = path.read_bytes()
    skipped = len(raw) - len(raw.removeprefix(b"\xef\xbb\xbf"))
    last: WholePairs = []

    def remember(pairs: WholePairs) -> dict[str, Any]:
        nonlocal last
        last = pairs  # the outermost object ends last
        return dict(pairs)

    try:
        text = raw[skipped:].decode()
        value = json.loads(text, strict=False, parse_int=integer, object_pairs_hook=remember)
    except RecursionError:
        raise broken from None
    except ValueError as error:
        raise DataError(
            f"{path}: not valid JSON at byte {skipped + byte_of(error)} ({why_of(error)}); "
            "the file is broken or truncated: fetch it again"
        ) from None
    if type(value) is not dict:
        raise broken
    return last
