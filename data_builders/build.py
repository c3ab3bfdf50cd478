"""Builds what a recipe describes, or leaves everything as it was and says why.

The build grows in a work folder beside its destination and takes its place by rename, so an
earlier build stays whole whatever happens. What ends it early decides what is kept: a kill, Ctrl-C,
a full disk or a dead worker leave the finished shards to go on with; a mistake leaves nothing,
since what mends it (another recipe, another file) would make the finished work anew anyway.
"""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvlm_sft.errors import CogVLMSFTError, DataError
from data_builders.engine import WorkerDied
from data_builders.manifest import is_build
from data_builders.pipeline import run_pipeline
from data_builders.recipe import BuildRecipe, load_recipe
from data_builders.workfolder import WorkFolder, work_folder

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BuildInterrupted(KeyboardInterrupt):
    """Ctrl-C during a build; the message says how to go on."""


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build made.

    Attributes:
        out: The build folder.
        conversations: Conversations written.
        read: Raw records read.
        dropped: Raw records dropped.
        manifest: Content of `manifest.json`.
        kept_shards: Shards of work that an interrupted run had finished.
        redone_shards: Shards of work that it had begun and lost.
    """

    out: Path
    conversations: int
    read: int
    dropped: int
    manifest: dict[str, Any]
    kept_shards: int
    redone_shards: int

    def summary(self) -> str:
        """A table of the sources and of what was dropped."""
        lines = [f"{'source':24} {'read':>10} {'kept':>10} {'dropped':>10} {'written':>10}"]
        for name, row in self.manifest["sources"].items():
            gone = sum(row["dropped"].values())
            lines.append(
                f"{name:24} {row['read']:>10,} {row['kept']:>10,} {gone:>10,} "
                f"{row['conversations']:>10,}"
            )
            lines += [f"  dropped {n:>7,}  {reason}" for reason, n in row["dropped"].items()]
            lines += [f"  noted   {n:>7,}  {name}" for name, n in row["repaired"].items()]
            if "split_unknown" in row["repaired"]:
                lines.append(
                    "  nothing says which of these records are held out; list train.txt, val.txt "
                    "and test.txt of Flickr30k Entities among the annotations to leave those out"
                )
        if self.kept_shards:
            lines.append(
                f"went on with an interrupted build: {self.kept_shards} shards of work were done, "
                f"{self.redone_shards} done again"
            )
        plural = "s" * (self.conversations != 1)
        lines.append(f"{self.conversations:,} conversation{plural} in {self.out}")
        lines.append(f"look at {self.out / 'report.html'}")
        return "\n".join(lines)


def build(recipe_path: str | Path, overrides: Sequence[str] = ()) -> BuildResult:
    """Builds what a recipe describes.

    Args:
        recipe_path: YAML file, or the name of a packaged data recipe.
        overrides: `key.sub=value`.

    Raises:
        RecipeError: The recipe is wrong.
        DataError: A file is missing or broken, the disk is full, or nothing is left to write.
        BuildInterrupted: Ctrl-C; building again goes on.
    """
    return build_recipe(load_recipe(recipe_path, overrides))


def build_recipe(recipe: BuildRecipe) -> BuildResult:
    """Builds a parsed recipe; see `build`."""
    out = recipe.out
    try:
        if out.is_symlink():  # it stays one: the build grows beside what it points at
            out = Path(os.path.realpath(out))
            recipe = recipe.model_copy(update={"out": out})
        if not out.name or (out.exists() and not _replaceable(out)):
            raise DataError(
                f"{out}: exists and is not a build folder (no build's manifest.json); choose "
                "another `out`"
            )
        with work_folder(out) as work:
            return _guarded(recipe, work)
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_full(out) from None
        if error.errno == errno.EPIPE:  # who reads our progress went away
            raise
        where = error.filename or out
        raise DataError(f"{where}: {error.strerror or error}; cannot build {out}") from None


def _guarded(recipe: BuildRecipe, work: WorkFolder) -> BuildResult:
    """Builds; whatever ends it early leaves a work folder to go on with, except a mistake."""
    out = recipe.out
    try:
        manifest = run_pipeline(work, recipe)
        work.release(out)
    except KeyboardInterrupt:
        raise BuildInterrupted(
            f"interrupted; what is done is kept in {work.path}. Build again with the same recipe "
            "to go on, or delete that folder"
        ) from None
    except WorkerDied:
        raise
    except CogVLMSFTError:
        work.remove()
        raise
    totals = manifest["totals"]
    return BuildResult(
        out, totals["conversations"], totals["read"], totals["dropped"], manifest,
        work.kept, work.redone,
    )  # fmt: skip


def _disk_full(out: Path) -> DataError:
    return DataError(
        f"{out}: the disk is full; free some space and build again, which goes on where it stopped "
        "(a build needs about twice the size of its annotation files). An earlier build there is "
        "untouched"
    )


def _replaceable(out: Path) -> bool:
    """Whether there is a build, or an empty folder: other programs write a manifest.json too."""
    return out.is_dir() and (is_build(out) or not any(out.iterdir()))
