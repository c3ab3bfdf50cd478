"""The folder in which a build grows, and what makes a killed build go on where it stopped.

It stands hidden beside its destination (`.NAME.building`) and takes its place by rename when the
build is complete, so an earlier build stays whole whatever happens; it is moved aside just before,
since a folder cannot be renamed onto one that holds files. Work is done in shards; a
finished one is a file that appears by rename, so it is there completely or not at all. What is
there is used again only if nothing that the build reads has changed: recipe, annotation files,
pictures and versions go into a fingerprint. Shards are begun one after the other, hence a kill at
any moment costs one shard at most; `journal.jsonl` records it.
"""

import fcntl
import io
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from cogvlm_sft.errors import DataError


@dataclass(frozen=True, slots=True)
class Shard:
    """What a finished shard left.

    Attributes:
        facts: A JSON object.
        arrays: Arrays by name.
    """

    facts: dict[str, Any]
    arrays: dict[str, Any]


class WorkFolder:
    """A build under way.

    Attributes:
        path: The folder.
        resumed: Whether an interrupted build is gone on with.
        kept: Shards that it had finished.
        redone: Shards that it had begun and lost.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.resumed = False
        self.kept = 0
        self.redone = 0

    def begin(self, fingerprint: str) -> None:
        """Keeps what an interrupted build with the same fingerprint finished, else clears all."""
        mark = self.path / "fingerprint"
        self.resumed = mark.is_file() and mark.read_text() == fingerprint
        if not self.resumed:
            for entry in self.path.iterdir():
                if entry.name != "lock":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            mark.write_text(fingerprint)
        lost = self._begun() - Counter(path.stem for path in self.path.glob("*.npz"))
        self.kept = len(list(self.path.glob("*.npz")))
        self.redone = len(lost)

    def load(self, stage: str, number: int) -> Shard | None:
        """A finished shard, or None."""
        try:
            with np.load(self._file(stage, number), allow_pickle=False) as content:
                arrays = {name: content[name] for name in content.files}
            return Shard(orjson.loads(arrays.pop("facts").tobytes()), arrays)
        except (OSError, ValueError, KeyError, EOFError):
            return None  # not there, or cut short by a power failure

    def start(self, stage: str, number: int) -> None:
        """Notes that work on a shard begins."""
        with (self.path / "journal.jsonl").open("ab") as journal:
            journal.write(orjson.dumps({"begun": f"{stage}-{number:05d}"}) + b"\n")

    def finish(self, stage: str, number: int, facts: dict[str, Any], **arrays: Any) -> None:
        """Saves what a shard left; from here on it is not done again."""
        packed = np.frombuffer(orjson.dumps(facts), np.uint8)
        content = io.BytesIO()
        np.savez(content, allow_pickle=False, facts=packed, **arrays)
        file = self._file(stage, number)
        partial = file.with_suffix(".partial")
        partial.write_bytes(content.getbuffer())
        os.replace(partial, file)

    def release(self, out: Path) -> None:
        """Puts the finished build in its place: the files that belong to it, and no others."""
        staging = self.path / "build"
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            os.rename(out, old)
        os.rename(staging, out)
        shutil.rmtree(old, ignore_errors=True)
        self.remove()

    def remove(self) -> None:
        """Deletes the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, stage: str, number: int) -> Path:
        return self.path / f"{stage}-{number:05d}.npz"

    def _begun(self) -> Counter[str]:
        journal = self.path / "journal.jsonl"
        if not journal.is_file():
            return Counter()
        begun: set[str] = set()
        for line in journal.read_bytes().splitlines():
            try:
                begun.add(orjson.loads(line)["begun"])
            except (orjson.JSONDecodeError, KeyError, TypeError):
                continue  # the line being written when the process died
        return Counter(begun)


@contextmanager
def work_folder(out: Path) -> Iterator[WorkFolder]:
    """Opens the work folder of a build for this process alone.

    Raises:
        DataError: Another process is building there.
    """
    path = out.with_name(f".{out.name}.building")
    path.mkdir(parents=True, exist_ok=True)
    with (path / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"{out}: another process is building there; wait for it, or choose another `out`"
            ) from None
        yield WorkFolder(path)
