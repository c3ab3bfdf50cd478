"""A checkpoint folder, or a file of text, appears whole or not at all.

Everything is written into a hidden folder first. Where the target is new it appears by one rename;
where it exists (and holds a run's logs) the files are moved in one by one, the configuration last:
a folder without it is no checkpoint, or no adapter, to any reader.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from cogvlm_sft.errors import CheckpointError


@contextmanager
def staged(out: str | Path, last: str = "config.json") -> Iterator[Path]:
    """A folder to write a checkpoint into, published at `out` when the block ends well.

    Args:
        out: the target.
        last: the file without which a folder is no checkpoint.

    Raises:
        CheckpointError: `out` holds a checkpoint already, or cannot be written.
    """
    target = Path(out)
    if (target / last).exists():
        raise CheckpointError(f"{target} already holds a checkpoint; choose another folder")
    # On the target's own file system: a rename does not cross from one to another.
    beside = not target.exists()
    staging = target.parent / f".{target.name}.writing" if beside else target / ".writing"
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        yield staging
        if beside:
            os.replace(staging, target)
        else:
            for file in sorted(staging.iterdir(), key=lambda file: file.name == last):
                os.replace(file, target / file.name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: the checkpoint cannot be written: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_text(path: Path, text: str) -> Path:
    """Writes a file beside its name and renames it.

    Raises:
        CheckpointError: the disk is full, or the folder cannot be written.
    """
    partial = path.with_name(path.name + ".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return path
