"""Reads Parquet tables as rows, and takes out the pictures that `datasets` keeps inside of them.

Tables on the Hub mostly hold their pictures' bytes. They are written out once, beside the table as
an archive's would be, because a build names files: `train.parquet` gets a folder
`train_pictures`. A picture is called by a hash of its bytes, so that the rows about one share it.
"""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from cogvlm_sft.errors import DataError
from data_builders.annotations import ROWS, require_file
from data_builders.archives import Members, write_out
from data_builders.tables import check_header

_PICTURE_ROWS = 64  # rows with pictures at a time
_KINDS = (
    (b"\xff\xd8\xff", "jpg"), (b"\x89PNG", "png"), (b"GIF8", "gif"), (b"BM", "bmp"),
    (b"II*\0", "tif"), (b"MM\0*", "tif"), (b"RIFF", "webp"),
)  # fmt: skip


def parquet_columns(path: Path) -> list[str]:
    """Names of a Parquet file's columns.

    Raises:
        DataError: The file is truncated or no Parquet file.
    """
    with _opened(path) as file:
        names: list[str] = file.schema_arrow.names
    return names


def parquet_rows(path: Path, needed: Mapping[str, str], pictures: str) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file.

    Args:
        path: The file.
        needed: Our name of each column that must be there, to the file's.
        pictures: Column in which bytes of pictures give way to the name of their file.

    Raises:
        DataError: The file is truncated or no Parquet file, or a column is missing.
    """
    with _opened(path) as file:
        check_header(str(path), file.schema_arrow.names, needed)
        inside = _may_hold_pictures(file, pictures)
        # Tables of one data set may hold the same picture, and be called the same.
        folder = "/".join(_folder(path.resolve()).parts[-2:])
        for part in file.iter_batches(batch_size=_PICTURE_ROWS if inside else ROWS):
            rows: list[dict[str, Any]] = part.to_pylist()
            for row in rows if inside else ():
                row[pictures] = _named(row[pictures], folder)
            yield from rows


def unpack_pictures(path: Path, column: str) -> Path | None:
    """Writes the pictures inside of a table beside it, unless that was done before.

    Args:
        path: A Parquet file.
        column: Of objects with `bytes`, as `datasets` stores an Image, or of lists of them.

    Returns:
        Their folder; None where the table holds none.

    Raises:
        DataError: The file is truncated or no Parquet file, or the folder cannot be written.
    """
    with _opened(path) as file:
        if not _may_hold_pictures(file, column) or next(_pictures(file, column), None) is None:
            return None
    return write_out(path, _folder(path), lambda table: _members(table, column))[0]


def _folder(path: Path) -> Path:
    return path.with_name(f"{path.stem}_pictures")


def _members(path: Path, column: str) -> Members:
    written: set[str] = set()
    with _opened(path) as file:
        for content in _pictures(file, column):
            name = _name(content)
            if name not in written:
                written.add(name)
                yield name, io.BytesIO(content)


def _pictures(file: Any, column: str) -> Iterator[bytes]:
    for part in file.iter_batches(batch_size=_PICTURE_ROWS, columns=[column]):
        for cell in part.column(0).to_pylist():
            for one in cell if isinstance(cell, list) else [cell]:
                if one is not None and one["bytes"] is not None:
                    yield one["bytes"]


def _may_hold_pictures(file: Any, column: str) -> bool:
    """Whether a column has a place for bytes; they may all be missing."""
    import pyarrow

    if column not in file.schema_arrow.names:
        return False
    kind = file.schema_arrow.field(column).type
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind):
        kind = kind.value_type
    if not pyarrow.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    held = kind.field("bytes").type
    return bool(pyarrow.types.is_binary(held) or pyarrow.types.is_large_binary(held))


def _named(cell: Any, folder: str) -> Any:
    if isinstance(cell, list):
        return [_named(one, folder) for one in cell]
    if cell is None or cell["bytes"] is None:
        return cell
    return f"{folder}/{_name(cell['bytes'])}"


def _name(content: bytes) -> str:
    kind = next((kind for start, kind in _KINDS if content.startswith(start)), "jpg")
    return f"{blake2b(content, digest_size=16).hexdigest()}.{kind}"


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(require_file(path)) as file:
            yield file
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(
            f"{path}: not a readable Parquet file of {path.stat().st_size} bytes "
            f"({str(error).splitlines()[0]}); is it truncated?"
        ) from None
