"""Zip and tar files as inputs: unpacked once, beside themselves, and never anywhere else.

`chart_image.zip` becomes the folder `chart_image`, as a person would do by hand; a folder of that
name that a person made is taken as it is. Members that climb out (`..`, absolute paths), links and
devices are refused one by one and named in the manifest; the rest is unpacked. It happens in a
hidden folder that is renamed when complete, so a killed run leaves no half folder behind.
"""

import errno
import lzma
import os
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from cogvlm_sft.errors import DataError
from data_builders.images import unsafe
from data_builders.progress import progress

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
_ANNOTATIONS = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".p")
_MARK = ".unpacked.json"
_SPARE = 64 << 20  # what any archive may unpack to
_SWELL = 200  # JSON shrinks to a tenth, pictures hardly; a bomb to a thousandth
# a name that is too long, or that is a file and a folder at once
_NAME_ERRORS = (
    errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EINVAL, errno.EILSEQ,
)  # fmt: skip
_BROKEN = (
    zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, RuntimeError,
    NotImplementedError,
)  # fmt: skip

Members = Iterator[tuple[str, IO[bytes] | None]]


def is_archive(path: Path) -> bool:
    """Whether a path is a file with the ending of an archive."""
    return path.name.lower().endswith(ENDINGS) and path.is_file()


def resolve(paths: list[Path], folder: bool) -> tuple[list[Path], dict[str, list[str]]]:
    """Archives among paths replaced by what they hold.

    Args:
        paths: Files and folders.
        folder: Whether an archive stands for its folder, or for the annotation files in it.

    Returns:
        The paths, and the refused members of each archive that had any.
    """
    found: list[Path] = []
    refused: dict[str, list[str]] = {}
    for path in paths:
        if not is_archive(path):
            found.append(path)
            continue
        unpacked, bad = unpack(path)
        if bad:
            refused[path.as_posix()] = bad
        if folder:
            found.append(unpacked)
            continue
        files = sorted(
            file
            for file in unpacked.rglob("*")
            if file.suffix.lower() in _ANNOTATIONS
            and not any(part.startswith((".", "__MACOSX")) for part in file.parts[-2:])
        )
        if not files:
            raise DataError(f"{path}: holds no annotation file ({', '.join(_ANNOTATIONS)})")
        found += files
    return found, refused


def unpack(archive: Path) -> tuple[Path, list[str]]:
    """Unpacks an archive beside itself, unless that was done before.

    Args:
        archive: A zip or tar file.

    Returns:
        The folder, and the members that were refused.

    Raises:
        DataError: The archive is broken or encrypted, or its folder cannot be written.
    """
    ending = next(e for e in sorted(ENDINGS, key=len, reverse=True)
                  if archive.name.lower().endswith(e))  # fmt: skip
    members = _zip_members if ending == ".zip" else _tar_members
    return write_out(archive, archive.with_name(archive.name[: -len(ending)]), members)


def write_out(
    archive: Path, folder: Path, members: Callable[[Path], Members]
) -> tuple[Path, list[str]]:
    """Writes the files in an archive to a folder, unless that was done before.

    Args:
        archive: The file.
        folder: Theirs; one that a person made is taken as it is.
        members: Name and content of every file; no content where it is no plain file.

    Returns:
        The folder, and the members that were refused.

    Raises:
        DataError: See `unpack`.
    """
    state = archive.stat()
    stamp = {"archive": archive.name, "bytes": state.st_size, "time": state.st_mtime_ns}
    if folder.is_dir():
        try:
            known = orjson.loads((folder / _MARK).read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return folder, []  # unpacked by hand
        if {key: known.get(key) for key in stamp} == stamp:
            return folder, list(known["refused"])
    elif folder.exists():
        raise DataError(f"{archive}: cannot be unpacked, {folder} is a file; move it away")
    staging = folder.with_name(f".{folder.name}.unpacking")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        refused = _unpack(archive, members(archive), staging)
        (staging / _MARK).write_bytes(orjson.dumps({**stamp, "refused": refused}))
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(staging, folder)
    except _BROKEN as error:
        raise DataError(
            f"{archive}: cannot be unpacked ({_first_line(error)}); it is broken, truncated or "
            "encrypted: fetch it again"
        ) from None
    except PermissionError as error:
        raise DataError(
            f"{archive}: cannot be unpacked beside itself ({error.strerror}); unpack it by hand "
            "and name the folder instead"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder, refused


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _unpack(archive: Path, members: Members, into: Path) -> list[str]:
    refused: list[str] = []
    room = _SWELL * archive.stat().st_size + _SPARE
    with progress(None, f"unpacking {archive.name}", " files") as bar:
        for name, content in members:
            bar.update()
            if content is None or unsafe(name):
                refused.append(name)
                continue
            target = into / name
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                stream = target.open("xb")
            except OSError as error:
                if error.errno not in _NAME_ERRORS:
                    raise
                refused.append(name)
                continue
            with stream:
                while part := content.read(1 << 20):
                    room -= len(part)
                    if room < 0:
                        raise DataError(
                            f"{archive}: unpacks to more than {_SWELL} times its size, which is "
                            "what an archive bomb does; unpack it by hand if you trust it"
                        )
                    stream.write(part)
    return sorted(refused)


def _zip_members(archive: Path) -> Members:
    with zipfile.ZipFile(archive) as content:
        for member in content.infolist():
            kind = (member.external_attr >> 16) & 0o170000
            if member.is_dir():
                continue
            # `filename` is made harmless by zipfile already; what the archive says is judged.
            name = member.orig_filename
            if kind not in (0, 0o100000):
                yield name, None
                continue
            with content.open(member) as stream:
                yield name, stream


def _tar_members(archive: Path) -> Members:
    with tarfile.open(archive, "r:*") as content:
        for member in content:
            if not member.isdir():
                stream: Any = content.extractfile(member) if member.isreg() else None
                yield member.name, stream
        # tarfile takes a file that was cut between two members, or in its checksum, for a whole one
        rest: Any = content.fileobj
        rest.seek(content.offset)
        if rest.read(512) != bytes(512):
            raise tarfile.ReadError(f"no end mark at byte {content.offset} of what it unpacks to")
        while rest.read(1 << 20):
            pass
