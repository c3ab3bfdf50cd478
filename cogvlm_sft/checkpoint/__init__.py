"""Checkpoint folders: read, checked and written in the released layout."""

from cogvlm_sft.checkpoint.load import (
    build_model,
    load_model,
    load_processor,
    save_checkpoint,
    weight_files,
)

__all__ = ["build_model", "load_model", "load_processor", "save_checkpoint", "weight_files"]
