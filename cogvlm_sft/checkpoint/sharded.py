"""Snapshots that FSDP wrote in shards, read without FSDP: to go on, to evaluate, to chat.

Tensors are put together in place, one after another, by torch's distributed checkpoint. Of the
optimizer only tensors are read: its groups and their rates follow from the recipe and the schedule.
"""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import nn
from torch.distributed.checkpoint import FileSystemReader

from cogvlm_sft.errors import CheckpointError

# accelerate's names.
_MODEL, _OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"


def is_sharded(folder: Path) -> bool:
    """Whether a snapshot was written by FSDP."""
    return (folder / _MODEL).is_dir()


def load_sharded_weights(model: nn.Module, folder: Path) -> None:
    """Copy the weights of a sharded snapshot into a model that is not split.

    Raises:
        CheckpointError: the snapshot is of another model.
    """
    _read(folder / _MODEL, {"model": model.state_dict()})


def load_sharded_moments(model: nn.Module, optimizer: Any, folder: Path) -> None:
    """Copy AdamW's state of a sharded snapshot into an optimizer that made no step yet.

    Args:
        model: whose parameters it steps on, under their own names.
        optimizer: torch's AdamW, wrapped or not.
        folder: of the snapshot.

    Raises:
        CheckpointError: the snapshot is of another model, or other parts of it learnt.
    """
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            state[name] = optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    _read(folder / _OPTIMIZER, {"optimizer": {"state": state}}, within="optimizer.state.")


def _read(folder: Path, target: dict[str, Any], within: str = "") -> None:
    reader = FileSystemReader(folder)
    wanted = set(_names(target))
    stored = {name for name in reader.read_metadata().state_dict_metadata if within in name}
    if wanted != stored:
        raise CheckpointError(
            f"{folder}: {len(wanted - stored)} tensors are missing and {len(stored - wanted)} "
            f"unexpected, first {min(wanted ^ stored)!r}; the snapshot is of another run"
        )
    with warnings.catch_warnings():
        # Every process reads for itself, which torch remarks on.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        distributed_checkpoint.load(target, storage_reader=reader, no_dist=True)


def _names(tree: dict[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _names(value, f"{prefix}{key}.")
        else:
            yield prefix + key
