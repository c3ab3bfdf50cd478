"""What the optimizer steps on, and how far: fp32 weights, and the schedule of the rates.

Both depart from the stack's defaults on purpose. TRL holds what learns in bf16, where most updates
of a fine-tuning run round to nothing; transformers' schedules give the first step a rate of zero.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.training_args import OptimizerNames, TrainingArguments


def make_optimizer(groups: list[dict[str, Any]], args: TrainingArguments) -> torch.optim.Optimizer:
    """AdamW on `groups`, fused or with 8-bit moments.

    The 8-bit one keeps both moments in blocks of 256 with a scale each; tensors below 4,096 entries
    stay in fp32. On a CPU there is nothing to page to.
    """
    settings: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }
    if args.optim != OptimizerNames.PAGED_ADAMW_8BIT:
        return torch.optim.AdamW(groups, fused=True, **settings)
    import bitsandbytes

    paged = args.device.type == "cuda"
    kind = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, **settings)
    return optimizer


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


def fp32_masters(model: nn.Module) -> dict[str, torch.Tensor]:
    """The fp32 weights that TRL will round to bf16: what learns beside 4-bit weights."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return {}
    return {name: p.data for name, p in model.named_parameters() if p.requires_grad}
