"""Snapshots: all of a run's state at one step, complete or not there at all.

A snapshot is written into a hidden folder, closed with a manifest of every file and its size,
flushed to the disk and renamed to `snapshots/step-00000400`. Whoever finds one can therefore trust
it, and one that was damaged later (truncated weights, a deleted optimizer or RNG file) is seen by
its manifest and headers and passed over with a warning. transformers' own resume takes the highest
number without looking, and goes on with a fresh optimizer where optimizer.pt is missing.
"""

import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from cogvlm_sft import launch
from cogvlm_sft.checkpoint.load import weight_files
from cogvlm_sft.errors import CheckpointError

MANIFEST = "snapshot.json"
_FOLDER = "snapshots"
_NAME = re.compile(r"step-(\d{8})")
_STAGING = ".writing"


def snapshot_folder(output: Path, step: int) -> Path:
    """Where the snapshot of a step stands in a run's output folder."""
    return output / _FOLDER / f"step-{step:08d}"


def staging_folder(output: Path) -> Path:
    """Where a snapshot is written before it is renamed; leftovers are of a killed run."""
    return output / _FOLDER / _STAGING


def snapshots(output: Path) -> list[Path]:
    """Every snapshot folder of a run, oldest first, complete or damaged."""
    root = output / _FOLDER
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name))


def snapshot_step(path: Path) -> int:
    """The step a snapshot was taken after."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a snapshot folder; expected step-NNNNNNNN")
    return int(match[1])


def newest_complete(output: Path) -> Path | None:
    """The newest snapshot that is complete; each damaged newer one is named on stderr."""
    for path in reversed(snapshots(output)):
        problem = damage(path)
        if problem is None:
            return path
        if launch.rank() == 0:
            print(f"warning: snapshot {path} is passed over: {problem}", file=sys.stderr)
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a snapshot folder, or None where it is complete.

    Sizes come from the manifest that closed it; safetensors headers must cover their file, zip
    archives (optimizer, scheduler, RNG) must have their directory, and the state must be the
    step's. Flipped bits inside a tensor are not looked for: that would mean reading all of it.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, int] = manifest["files"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        return f"no readable {MANIFEST} ({type(error).__name__})"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt"):
                    pass
            elif file.suffix in (".pt", ".pth"):
                zipfile.ZipFile(file).close()
        except (SafetensorError, zipfile.BadZipFile, OSError) as error:
            return f"{name} is unreadable ({error})"
    try:
        state = json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return "trainer_state.json is unreadable"
    if state.get("global_step") != snapshot_step(path):
        return f"trainer_state.json is of step {state.get('global_step')}"
    return None


def publish(staging: Path, target: Path) -> None:
    """Close a written snapshot with its manifest, flush it, and rename it into place.

    Args:
        staging: folder that holds every file of the snapshot.
        target: its final name; a damaged folder of that name is replaced.
    """
    files = sorted(file for file in staging.rglob("*") if file.is_file())
    sizes = {file.relative_to(staging).as_posix(): file.stat().st_size for file in files}
    manifest = staging / MANIFEST
    manifest.write_text(json.dumps({"files": sizes}, indent=1) + "\n", encoding="utf-8")
    for path in (*files, manifest, staging):
        _flush(path)
    if target.exists():
        shutil.rmtree(target)
    os.replace(staging, target)
    _flush(target.parent)


def rotate(output: Path, keep: int, step: int) -> None:
    """Delete all but `keep` snapshots; called only after a new one, of `step`, stands.

    Later ones are damaged ones that the run passed over; they must not count as kept.
    """
    found = snapshots(output)
    kept = [path for path in found if snapshot_step(path) <= step][-keep:]
    for path in set(found) - set(kept):
        # The manifest goes first: a delete that is interrupted leaves what counts as damaged.
        (path / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def remove_leftovers(output: Path) -> None:
    """Delete the half-written folder of a run that was killed while saving."""
    shutil.rmtree(staging_folder(output), ignore_errors=True)


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy a snapshot's weights into a model, every name and shape accounted for.

    transformers' resume loads with `strict=False` and goes on with fresh weights for a key that
    is missing.

    Raises:
        CheckpointError: a key is missing, unexpected or of another shape.
    """
    wanted = model.state_dict()
    seen: set[str] = set()
    for name, tensor in _tensors(folder):
        if name not in wanted:
            raise CheckpointError(f"{folder}: unexpected weight {name!r}; not one of this model's")
        if wanted[name].shape != tensor.shape:
            raise CheckpointError(
                f"{folder}: weight {name!r} has shape {tuple(tensor.shape)}, the model's is "
                f"{tuple(wanted[name].shape)}"
            )
        with torch.no_grad():
            wanted[name].copy_(tensor)
        seen.add(name)
    if missing := sorted(wanted.keys() - seen):
        raise CheckpointError(
            f"{folder}: {len(missing)} weights are missing, first {missing[0]!r}; the snapshot "
            "is of another model"
        )


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for file in weight_files(folder):
        yield from load_file(file, device="cpu").items()


def _flush(path: Path) -> None:
    """Force a file or folder to the disk, so that the rename cannot be newer than its contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
