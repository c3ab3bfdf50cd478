"""Reads a pickle of plain data without running any code.

REFER's referring expressions are pickled by Python 2. A pickle is a program: this reader knows
lists, dicts, texts and numbers, and refuses every name that the program asks for (`os.system` as
much as `collections.OrderedDict`), so nothing can be imported or called. A pickle may also refer to
one list a million times over; what it holds is counted against the file's size.
"""

import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

from cogvlm_sft.errors import DataError
from data_builders.annotations import require_file

_PLAIN = (str, int, float, bool, type(None))


class _Refused(Exception):
    """The pickle asks for more than plain data."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise _Refused(f"it asks to load {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused("it refers to objects outside of the file")


def read_pickle(path: Path) -> Any:
    """The plain data of a pickle: lists, tuples, dicts, texts, numbers.

    Texts of Python 2 are UTF-8; a byte that is none becomes half a surrogate pair, which the record
    that holds it is dropped for later.

    Raises:
        DataError: The file is missing, truncated (with the byte), or asks to load or call anything.
    """
    raw = require_file(path).read_bytes()
    try:
        value = _PlainUnpickler(io.BytesIO(raw), encoding="utf-8", errors="surrogateescape").load()
        _count(value, 64 * len(raw))
    except _Refused as refused:
        raise DataError(
            f"{path}: {refused}, near byte {_position(raw)}; a data set needs no code, "
            "so the file is refused and nothing of it was run"
        ) from None
    except Exception as error:  # a broken pickle makes the reader raise whatever it provokes
        raise DataError(
            f"{path}: not a readable pickle of {len(raw)} bytes, broken near byte "
            f"{_position(raw)} ({str(error) or type(error).__name__}); is it truncated? "
            "fetch it again"
        ) from None
    return value


def _count(value: Any, budget: int) -> None:
    """Refuses what is not plain, and what unfolds to far more than the file holds."""
    waiting = [value]
    while waiting:
        budget -= 1
        if budget < 0:
            raise _Refused("it unfolds to far more than its size")
        item = waiting.pop()
        if type(item) is dict:
            waiting += item
            waiting += item.values()
        elif type(item) in (list, tuple):
            waiting += item
        elif type(item) is bytes:
            budget -= len(item)
        elif type(item) not in _PLAIN:
            raise _Refused(f"it holds a {type(item).__name__}")


def _position(raw: bytes) -> int:
    """Where the program of a pickle loads a name, or where it breaks off."""
    stream = io.BytesIO(raw)
    place = 0
    try:
        for opcode, _, position in pickletools.genops(stream):
            place = position or 0
            if opcode.name in ("GLOBAL", "STACK_GLOBAL", "INST", "PERSID", "BINPERSID"):
                return place
    except Exception:  # the disassembler stops where the reader does
        return min(stream.tell(), len(raw))
    return place
