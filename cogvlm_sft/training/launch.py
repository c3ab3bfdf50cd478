"""Which process of a run this is, and what the launcher told it about sharding."""

import os


def world_size() -> int:
    """Processes that train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def under_fsdp() -> bool:
    """Whether accelerate's launcher asked for FSDP."""
    return _told("ACCELERATE_USE_FSDP")


def under_deepspeed() -> bool:
    """Whether accelerate's launcher asked for DeepSpeed."""
    return _told("ACCELERATE_USE_DEEPSPEED")


def _told(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"
