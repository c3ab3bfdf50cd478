"""Reads CSV and TSV tables as rows, with the line in every message.

Tables are strict: a quote that is never closed or a byte that is not UTF-8 fails the build with its
place; a row with too few or too many cells is handed on as malformed, to be dropped by name. Each
row of a CSV carries the line on which it begins as `_line`.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cogvlm_sft.errors import DataError
from data_builders.annotations import require_file


def csv_rows(path: Path, delimiter: str, needed: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Rows of a CSV or TSV file with a header.

    Args:
        path: The file, UTF-8 with or without a byte order mark.
        delimiter: What stands between cells.
        needed: Our name of each column that must be there, to the file's.

    Raises:
        DataError: With file and line: a column is missing or there twice, a quote is not closed,
            or the text is not UTF-8.
    """
    csv.field_size_limit(1 << 30)
    with require_file(path).open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        header: list[str] = []
        last: dict[str, Any] | None = None
        line = 1
        try:
            for cells in reader:
                begins, line = line, reader.line_num + 1
                if not cells:
                    continue
                if not header:
                    header = [cell.strip() for cell in cells]
                    check_header(f"{path}:{begins}", header, needed)
                    continue
                row: dict[str, Any] = dict(zip(header, cells, strict=False))
                row["_line"] = begins
                if len(cells) != len(header):
                    row["_malformed"] = "cell_count_differs"
                if last is not None:
                    yield last
                last = row
        except csv.Error as error:
            raise DataError(
                f"{path}:{reader.line_num}: broken table ({error}); is a quote missing, or is "
                f"the file truncated at byte {path.stat().st_size}?"
            ) from None
        except UnicodeDecodeError:
            raise _not_utf8(path) from None
    if last is not None:
        if len(last) - 2 < len(header) and "_malformed" in last and not _ends_line(path):
            raise DataError(
                f"{path}:{last['_line']}: the file ends at byte {path.stat().st_size} inside this "
                f"row, after {len(last) - 2} of {len(header)} cells; it is truncated"
            )
        yield last


def check_header(where: str, found: list[str], needed: Mapping[str, str]) -> None:
    """Looks at the names of a table's columns.

    Args:
        where: File and line, for messages.
        found: The names.
        needed: Our name of each column that must be there, to the file's.

    Raises:
        DataError: A column is missing or there twice.
    """
    for key, name in needed.items():
        if name not in found:
            hint = f"Say which one it is: columns: {{{key}: …}}, or --columns {key}=…"
            if len(found) == 1 and re.search("[;\\t|,]", found[0]):
                hint = (
                    "It is one column: set delimiter (--delimiter) to what stands between columns"
                )
            raise DataError(
                f"{where}: no column {name!r}; found {', '.join(map(repr, found))}. {hint}"
            )
    twice = [name for name, count in Counter(found).items() if count > 1]
    if twice:
        raise DataError(f"{where}: column {twice[0]!r} is there twice; rename one")


def _ends_line(path: Path) -> bool:
    with path.open("rb") as raw:
        raw.seek(-1, os.SEEK_END)
        return raw.read(1) in b"\r\n"


def _not_utf8(path: Path) -> DataError:
    """Where a table stops being UTF-8."""
    offset = 0
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"{path}:{number}: not UTF-8 at byte {offset + error.start}"
                return DataError(f"{where} ({error.reason}); save the table as UTF-8")
            offset += len(line)
    return DataError(f"{path}: not UTF-8 at byte {offset}; save the table as UTF-8")
