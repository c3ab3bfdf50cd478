"""What of the model learns, and at what rate."""

from cogvlm_sft.tune.groups import (
    GROUPS,
    GroupSummary,
    decays,
    group_of,
    group_table,
    parameter_groups,
    set_trainable,
    summarize_groups,
)

__all__ = [
    "GROUPS",
    "GroupSummary",
    "decays",
    "group_of",
    "group_table",
    "parameter_groups",
    "set_trainable",
    "summarize_groups",
]
