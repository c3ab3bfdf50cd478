"""Checkpoint folders: read, checked and written in the released layout.

The names are imported on first use, so that `checkpoint.inspect` answers without loading torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cogvlm_sft.checkpoint.load import (
        build_model,
        load_model,
        load_processor,
        save_checkpoint,
        weight_files,
    )

__all__ = ["build_model", "load_model", "load_processor", "save_checkpoint", "weight_files"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("cogvlm_sft.checkpoint.load"), name)
