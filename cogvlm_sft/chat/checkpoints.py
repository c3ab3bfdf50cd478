"""Which checkpoints belong to a run: its result, the base it began from, its snapshots.

Side by side they show what alignment changed. The base is what the run's own `recipe.yaml` names.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml

from cogvlm_sft.checkpoint.adapter import named_checkpoint
from cogvlm_sft.training.snapshots import snapshot_step, snapshots

RUN = "run"


def related_checkpoints(folder: Path, further: Sequence[Path] = ()) -> dict[str, Path]:
    """Label and folder of each checkpoint to choose from, the run itself first.

    Args:
        folder: A run's output folder, or any checkpoint folder.
        further: Others, labelled by their folder's name.
    """
    found = {RUN: folder}
    if (base := _base(folder)) is not None:
        found["base"] = base
    for snapshot in snapshots(folder):
        found[f"step {snapshot_step(snapshot)}"] = snapshot
    for other in further:
        label, number = other.name, 2
        while label in found:
            label, number = f"{other.name} ({number})", number + 1
        found[label] = other
    return found


def _base(folder: Path) -> Path | None:
    """The checkpoint that the run's recipe began from, where it is still there."""
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        return None
    try:
        named = yaml.safe_load(recipe.read_text(encoding="utf-8"))["model"]["checkpoint"]
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError):
        return None  # the run can be talked to all the same
    return named_checkpoint(named, folder) if isinstance(named, str) else None
