"""Which process of a run this is, and what the launcher told it about sharding."""

import os


def world_size() -> int:
    """Processes that train together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Number of this process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process among those of its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def under_fsdp() -> bool:
    """Whether accelerate's launcher asked for FSDP."""
    return _told("ACCELERATE_USE_FSDP")


def under_deepspeed() -> bool:
    """Whether accelerate's launcher asked for DeepSpeed."""
    return _told("ACCELERATE_USE_DEEPSPEED")


def fsdp_settings() -> tuple[str, str]:
    """The launcher's version of FSDP and the kind of its snapshots."""
    kind = os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    return os.environ.get("FSDP_VERSION", "1"), kind


def way_of_sharding() -> str | None:
    """The launcher's way as the estimate names it, "FSDP2", "ZeRO-2" or "ZeRO-3"; None without."""
    if under_fsdp():
        return "FSDP2"
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    return f"ZeRO-{stage}" if under_deepspeed() else None


def _told(variable: str) -> bool:
    return os.environ.get(variable, "").lower() == "true"
