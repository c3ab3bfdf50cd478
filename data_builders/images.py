"""Finds the picture file that an annotation means.

Released annotations name pictures loosely: COCO train2017 names for files of the 2014 split, Visual
Genome ids without saying which of two folders, `.jpg` for what is a GIF or a PNG. `ImageFinder`
lists the given folders once and answers by path, then by picture id. What it returns is always
relative to the image root and inside it: `..`, absolute paths and links that lead out are reasons
to drop, never paths. Whether the file is a usable picture is `image_check`'s question.
"""

import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

from cogvlm_sft.errors import DataError
from data_builders.progress import progress

SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jfif",
        ".png",
        ".gif",
        ".bmp",
        ".webp",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pnm",
        ".jp2",
    ]
)
_COCO = re.compile(r"^(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})$", re.IGNORECASE)
_VG_FOLDERS = ("VG_100K", "VG_100K_2")


def picture_key(name: str) -> str:
    """The id of a picture: the COCO number whatever the split, else the stem in lower case."""
    stem = name.rsplit("/", 1)[-1]
    dot = stem.rfind(".")
    if dot > 0:
        stem = stem[:dot]
    coco = _COCO.match(stem)
    return coco.group(1) if coco else _folded(stem)


def unsafe(name: str) -> bool:
    """Whether a name is absolute, climbs, or is no relative file name at all."""
    if not name or "\0" in name or name[0] in "/\\~" or name[1:2] == ":" or "://" in name:
        return True
    return ".." in name and ".." in re.split(r"[/\\]", name)


class ImageFinder:
    """Looks pictures up in folders below an image root."""

    def __init__(self, image_root: Path, folders: Sequence[Path], must_exist: bool = True) -> None:
        """Lists the folders.

        Args:
            image_root: Paths in records are relative to it.
            folders: Where to look, first one first; none means the root itself.
            must_exist: Whether a picture that is not there is a reason to drop; otherwise the
                name of the annotation is taken as the path.

        Raises:
            DataError: A folder is missing, or lies outside of the root.
        """
        self.root = Path(os.path.realpath(image_root))
        self.must_exist = must_exist
        self._memo: dict[str, tuple[str | None, str]] = {}
        self._listed = False
        self._paths: set[str] = set()
        self._folders: set[str] = set()
        self._by_stem: dict[str, list[str]] = {}
        self._by_key: dict[str, list[str]] = {}
        self._prefix = ""
        seen = sha256()  # no attribute: a finder is sent to worker processes
        for place, folder in enumerate(folders or [image_root]):
            real = Path(os.path.realpath(folder))
            if not real.is_relative_to(self.root):
                raise DataError(
                    f"image folder {folder} lies outside of the image root {image_root}; "
                    "set image_root to a folder that holds all image folders"
                )
            prefix = real.relative_to(self.root).as_posix()
            prefix = "" if prefix == "." else prefix + "/"
            if place == 0:
                self._prefix = prefix if folders else ""
            if not real.is_dir():
                if must_exist:
                    raise DataError(
                        f"image folder {folder} is missing; check the path, or set "
                        "images.check=false to build without looking at pictures"
                    )
                continue
            if must_exist or folders:
                self._list(real, prefix, seen)
                self._listed = True
        self._digest = seen.hexdigest()

    def digest(self) -> str:
        """A hash of the names, sizes and times of all pictures found."""
        return self._digest

    def files(self) -> list[str]:
        """All pictures found, relative to the root, sorted."""
        return sorted(self._paths)

    def find(self, name: str) -> tuple[str | None, str]:
        """The path of a picture relative to the root, or None with the reason.

        Args:
            name: As the annotation has it, with or without folders and extension.
        """
        known = self._memo.get(name)
        if known is None:
            known = self._memo[name] = self._find(name)
        return known

    def _find(self, name: str) -> tuple[str | None, str]:
        if unsafe(name):
            return None, "image_path_unsafe"
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        joined = "/".join(parts)
        if joined in self._paths:
            return joined, ""
        several = False
        for candidates in self._candidates(parts) if self._listed else ():
            path = _choose(candidates, parts)
            if path is not None:
                return path, ""
            several = several or len(candidates) > 1
        if several:
            return None, "image_ambiguous"
        bare = name.strip()
        if bare != name:
            return self.find(bare)
        plain = self._prefix + joined
        if self._listed:
            target = os.path.join(self.root, plain)
            if os.path.lexists(target) and not _inside(target, self.root):
                return None, "image_outside_root"
        if self.must_exist or not parts:
            return None, "image_missing"
        return plain, ""

    def _candidates(self, parts: list[str]) -> Iterator[list[str]]:
        """Files that a name may mean, the surest first.

        A name may lack leading folders of the listed ones or have some too many, and its extension
        may be wrong. But a folder of the name that exists on disk is meant: `a/1.jpg` is never
        answered by `b/1.jpg` while there is an `a`. A number alone is enough for COCO and Visual
        Genome, whose folders are splits of one collection, and for names without a folder.
        """
        for skipped in range(len(parts)):
            known = self._folders.intersection(parts[:skipped])
            found = self._by_stem.get(_stem("/".join(parts[skipped:])), ())
            yield [path for path in found if known.issubset(path.split("/")[:-1])]
            if not skipped and len(parts) > 1:  # the listed folder is a parent of the one meant
                found = self._by_key.get(picture_key(parts[-1]), ())
                whole = "/" + _stem("/".join(parts))
                yield [path for path in found if _stem(path).endswith(whole)]
        if parts:
            found = self._by_key.get(picture_key(parts[-1]), ())
            if _COCO.match(PurePosixPath(parts[-1]).stem):
                yield [path for path in found if _COCO.match(PurePosixPath(path).stem)]
            elif len(parts) == 1:
                yield list(found)
            elif parts[-2] in _VG_FOLDERS:
                yield [path for path in found if PurePosixPath(path).parent.name in _VG_FOLDERS]

    def _list(self, folder: Path, prefix: str, seen: Any) -> None:
        found = []
        with progress(None, f"listing {folder.name}", " pictures", scale=True, delay=2) as bar:
            for entry in _walk(folder, self.root):
                found.append(entry)
                bar.update()
        for relative, stamp in sorted(found):
            path = prefix + relative
            seen.update(f"{path}\0{stamp}\n".encode("utf-8", "surrogateescape"))
            self._by_stem.setdefault(_stem(relative), []).append(path)
            if path not in self._paths:
                self._paths.add(path)
                self._folders.update(path.split("/")[:-1])
                self._by_key.setdefault(picture_key(relative), []).append(path)


def _stem(path: str) -> str:
    """A path without its extension, in one spelling."""
    dot = path.rfind(".")
    return _folded(path[:dot] if dot > path.rfind("/") + 1 else path)


def _folded(name: str) -> str:
    """Lower case, accents composed: Windows ignores the one and macOS splits the other."""
    low = name.lower()
    return low if low.isascii() else unicodedata.normalize("NFC", low)


def _choose(candidates: list[str], parts: list[str]) -> str | None:
    """The candidate that shares most with the name; None where that leaves several pictures."""
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    folders = set(parts[:-1])

    def likeness(path: str) -> tuple[bool, int]:
        *above, last = path.split("/")
        return last == parts[-1], len(folders.intersection(above))

    best = max(map(likeness, candidates))
    left = sorted({path for path in candidates if likeness(path) == best})
    # one COCO number, or one Visual Genome id, is one picture wherever it lies
    same = all(_COCO.match(PurePosixPath(path).stem) for path in left) or all(
        PurePosixPath(path).parent.name in _VG_FOLDERS for path in left
    )
    return left[0] if len(left) == 1 or same else None


def _inside(path: str, root: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(root)


def _walk(folder: Path, root: Path) -> Iterator[tuple[str, str]]:
    """Pictures below a folder, relative to it, with size and time.

    Links that lead out of the root are not followed.
    """
    pending = [""]
    seen: set[str] = set()
    while pending:
        inner = pending.pop()
        with os.scandir(folder / inner) as entries:
            for entry in entries:
                name = entry.name
                if name.startswith(".") or name == "__MACOSX":
                    continue
                linked = entry.is_symlink()
                if linked and not _inside(entry.path, root):
                    continue
                if entry.is_dir():
                    real = os.path.realpath(entry.path)
                    if real not in seen:  # a link may point at its own parent
                        seen.add(real)
                        pending.append(f"{inner}{name}/")
                elif os.path.splitext(name)[1].lower() in SUFFIXES and entry.is_file():
                    facts = entry.stat()
                    yield inner + name, f"{facts.st_size} {facts.st_mtime_ns}"
