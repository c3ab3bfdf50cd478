"""What each source needs and what of it is on this disk: the table of `cogvlm-sft data sources`."""

import os
from collections.abc import Sequence
from pathlib import Path

from cogvlm_sft.errors import RecipeError
from data_builders.images import SUFFIXES
from data_builders.recipe import nearest, source_names
from data_builders.source import Source, load_source


def list_sources(folder: Path | None = None, names: Sequence[str] = ()) -> str:
    """A table of sources: files to fetch, sizes, licence, image folders, what is missing.

    Args:
        folder: Where to look for the files; the working directory unless given.
        names: Of the sources; none means all.

    Raises:
        RecipeError: There is no such source; the nearest one is named.
    """
    known = source_names()
    for name in names:
        if name not in known:
            raise RecipeError(f"unknown source {name!r}{nearest(name, known)}")
    files, folders = _look(folder or Path.cwd())
    return "\n\n".join(
        "\n".join(_block(load_source(name), files, folders)) for name in names or known
    )


def _look(root: Path) -> tuple[set[str], dict[str, int]]:
    """Paths of all files but pictures, and how many pictures each folder holds."""
    files: set[str] = set()
    pictures: dict[str, int] = {}
    for here, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith("."))
        place = Path(here).relative_to(root)
        others = [n for n in names if os.path.splitext(n)[1].lower() not in SUFFIXES]
        files.update(f"/{(place / name).as_posix()}" for name in others)
        own = len(names) - len(others)
        for part in (place, *place.parents):  # a folder counts what its subfolders hold
            key = f"/{part.as_posix()}"
            pictures[key] = pictures.get(key, 0) + own
    return files, pictures


def _block(source: type[Source], files: set[str], folders: dict[str, int]) -> list[str]:
    use = "" if source.commercial else " (non-commercial)"
    rows = [f"{source.name}: {source.title}", f"  licence  {source.license}{use}"]
    for number, place in enumerate(source.home.split("; ") if source.home else ()):
        rows.append(f"  {'' if number else 'fetch':8} {place}")
    for file in source.files:
        state = "here" if any(place.endswith(f"/{file.name}") for place in files) else "missing"
        if "*" in file.name:  # one's own files, whatever they are called
            state = "any of"
        rows.append(f"  {state:8} {file.name:57} {file.size_in_words():>18}  {file.note}".rstrip())
    for wanted in source.image_folders:
        held = [n for place, n in folders.items() if f"{place}/".endswith(f"/{wanted.name}/")]
        state = "here" if any(held) else "missing"
        found = f"{max(held, default=0):,} pictures"
        rows.append(f"  {state:8} {wanted.name + '/':57} {found:>18}  {wanted.note}")
    return rows
