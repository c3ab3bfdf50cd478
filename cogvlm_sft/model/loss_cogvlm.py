"""Cross-entropy over a large vocabulary, in the memory of the logits alone.

torch keeps the log-probabilities of all tokens in fp32 beside the logits and makes their gradient
in a third tensor of that size. Here the forward pass keeps one number a row, and the backward pass
writes the gradient over the logits, some rows at a time. The sums are fp32 whatever the dtype. By
hand, because torch's own `linear_cross_entropy` is there from 2.13 on only and multiplies by the
head's bare weight, past `model/linear_cogvlm.py` and whatever wraps the head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional

# Rows in fp32 at a time: 8 MB of a vocabulary of 32,000.
_ROWS = 64


class _SummedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = [
            functional.cross_entropy(rows.float(), right, reduction="none")
            for rows, right in zip(logits.split(_ROWS), targets.split(_ROWS), strict=True)
        ]
        loss = torch.cat(losses)
        # The log-sum-exp of each row.
        sums = loss + logits.gather(1, targets[:, None]).squeeze(1).float()
        ctx.save_for_backward(logits, targets, sums)
        return loss.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, targets, sums = ctx.saved_tensors
        parts = (part.split(_ROWS) for part in (logits, targets[:, None], sums[:, None]))
        for rows, right, sum_ in zip(*parts, strict=True):
            found = rows.float().sub_(sum_).exp_()  # the rows themselves if they are fp32
            found.scatter_add_(1, right, found.new_full((), -1.0).expand_as(right))
            rows.copy_(found.mul_(gradient))
        return logits, None


def summed_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """`cross_entropy(logits.float(), targets, reduction="sum")`; its backward eats the logits.

    Nobody else may read `logits` once the backward pass has begun, nor may it run twice: torch
    raises an error then, since it counts writes to what it keeps.

    Args:
        logits: (rows, vocabulary).
        targets: (rows,) of int64, every one a token.

    Returns:
        Scalar in fp32.
    """
    loss: torch.Tensor = _SummedCrossEntropy.apply(logits, targets)
    return loss


__all__ = ["summed_cross_entropy"]
