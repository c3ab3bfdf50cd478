"""What the optimizer steps on, and how far: fp32 weights, and the schedule of the rates.

Both depart from the stack's defaults on purpose. TRL holds what learns in bf16, where most updates
of a fine-tuning run round to nothing; transformers' schedules give the first step a rate of zero.
"""

import math
from collections.abc import Callable

from torch import nn


def rate_schedule(kind: str, warmup: int, total: int) -> Callable[[int], float]:
    """Factor on every group's rate at a step (from 0): warm-up, then cosine to 0 or constant."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if kind != "cosine":
            return 1.0
        done = (step - warmup) / max(1, total - warmup)
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    return factor


def hold_trainable_in_fp32(model: nn.Module) -> None:
    """Cast what learns to fp32, in place.

    At lr 1e-5 an AdamW update is below half a bf16 step for most weights: held in bf16, about one
    entry in ten moves in 20 steps. Frozen weights keep their dtype; autocast does the products.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
