"""What happens to the routed rows between the linears, each in one pass and saving little.

The rows of a batch stand with the language expert's first. Autograd would split, join and scatter
them through zero-filled tensors and keep every intermediate result; these functions write each
result once and keep what their gradient needs: a norm keeps its input and one number a row, SwiGLU
its two inputs, rotation nothing. They are exact: the same arithmetic as the plain expressions
beside them in the docstrings.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

Parts = tuple[torch.Tensor, torch.Tensor]


class _Gather(torch.autograd.Function):
    """`index_select` by rows that are all different: its gradient is a copy, not an addition."""

    @staticmethod
    def forward(ctx: Any, source: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.count = source.shape[0]
        return source.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        whole = gradient.new_zeros(ctx.count, *gradient.shape[1:])
        return whole.index_copy(0, rows, gradient), None


def gather_rows(source: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows of `source` (rows, ...) by distinct indices, cheap in both directions."""
    return _Gather.apply(source, rows)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, eps: float, language: int
    ) -> tuple[torch.Tensor, ...]:
        wide = rows.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = scale.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
        normed = (wide * scale).mul_(weight.float()).to(rows.dtype)
        ctx.save_for_backward(rows, weight, scale)
        ctx.language = language
        return normed[:language], normed[language:]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight, scale = ctx.saved_tensors
        gradient = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
        gradient[: ctx.language].copy_(gradients[0])
        gradient[ctx.language :].copy_(gradients[1])
        normed = rows.float() * scale
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (gradient * normed).sum(0).to(weight.dtype)
        gradient.mul_(weight.float())
        along = torch.linalg.vecdot(gradient, normed).div_(rows.shape[-1])
        grad_rows = gradient.addcmul_(normed, along[:, None], value=-1).mul_(scale)
        return grad_rows.to(rows.dtype), grad_weight, None, None


def norm_by_expert(rows: torch.Tensor, weight: torch.Tensor, eps: float, language: int) -> Parts:
    """RMSNorm in fp32 with the weight inside, cut into the two experts' rows.

    Args:
        rows: (rows, hidden), the first `language` of them the language expert's.
        weight: (hidden,).
        eps: added to the mean square.
        language: number of rows of the language expert.
    """
    language_rows, vision_rows = _Norm.apply(rows, weight, eps, language)
    return language_rows, vision_rows


class _AddByExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, language: torch.Tensor, vision: torch.Tensor
    ) -> torch.Tensor:
        cut = language.shape[0]
        ctx.cut, ctx.dtypes = cut, (language.dtype, vision.dtype)
        total = torch.empty_like(rows, dtype=torch.promote_types(rows.dtype, language.dtype))
        torch.add(rows[:cut], language, out=total[:cut])
        torch.add(rows[cut:], vision, out=total[cut:])
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        language, vision = ctx.dtypes
        return gradient, gradient[: ctx.cut].to(language), gradient[ctx.cut :].to(vision)


def add_by_expert(rows: torch.Tensor, parts: Parts) -> torch.Tensor:
    """`rows + cat(parts)`."""
    return _AddByExpert.apply(rows, *parts)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(gradient * up, gate)
        return grad_gate, functional.silu(gate).mul_(gradient)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up`."""
    return _SwiGLU.apply(gate, up)


def _turn(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> None:
    """Rotates (tokens, heads, head size), halves paired (NeoX), in place."""
    first, second = states.chunk(2, dim=-1)
    mixed = first * sine
    first.mul_(cosine).addcmul_(second, sine, value=-1)
    second.mul_(cosine).add_(mixed)


class _PlaceRotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        language: torch.Tensor,
        vision: torch.Tensor,
        order: torch.Tensor,
        cosine: torch.Tensor,
        sine: torch.Tensor,
        widths: list[int],
        heads: int,
    ) -> tuple[torch.Tensor, ...]:
        cut = language.shape[0]
        placed = language.new_empty(order.shape[0], language.shape[1])
        placed.index_copy_(0, order[:cut], language)
        placed.index_copy_(0, order[cut:], vision)
        size = 2 * cosine.shape[-1]
        _turn(placed[:, : heads * size].unflatten(-1, (heads, size)), cosine, sine)
        ctx.save_for_backward(order, cosine, sine)
        ctx.cut, ctx.heads = cut, heads
        return tuple(placed.split(widths, dim=-1))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        order, cosine, sine = ctx.saved_tensors
        gradient = torch.cat(gradients, dim=-1)
        size = 2 * cosine.shape[-1]
        turned = gradient[:, : ctx.heads * size].unflatten(-1, (ctx.heads, size))
        _turn(turned, cosine, -sine)
        language = gradient.index_select(0, order[: ctx.cut])
        vision = gradient.index_select(0, order[ctx.cut :])
        return language, vision, None, None, None, None, None


def place_rotated(
    parts: Parts,
    order: torch.Tensor,
    angles: tuple[torch.Tensor, torch.Tensor],
    widths: list[int],
    heads: int,
) -> tuple[torch.Tensor, ...]:
    """Brings both experts' rows into the order of the run, rotates heads, and splits.

    Args:
        parts: (rows of one expert, sum of `widths`) each.
        order: (rows,) place in the run of each row, the language expert's first; every place once.
        angles: cosine and sine, (tokens of the run, 1, head size / 2).
        widths: columns of each result.
        heads: so many heads at the beginning of each row are rotated.

    Returns:
        (tokens of the run, width) for each width.
    """
    cosine, sine = (part.to(parts[0].dtype) for part in angles)
    return _PlaceRotated.apply(*parts, order, cosine, sine, widths, heads)


class _TakeByExpert(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run: torch.Tensor, order: torch.Tensor, language: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(order)
        ctx.shape, ctx.language = run.shape, language
        return run.index_select(0, order[:language]), run.index_select(0, order[language:])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (order,) = ctx.saved_tensors
        some = order.shape[0] < ctx.shape[0]
        whole = (gradients[0].new_zeros if some else gradients[0].new_empty)(ctx.shape)
        whole.index_copy_(0, order[: ctx.language], gradients[0])
        whole.index_copy_(0, order[ctx.language :], gradients[1])
        return whole, None, None


def take_by_expert(run: torch.Tensor, order: torch.Tensor, language: int) -> Parts:
    """The two experts' rows of a run (tokens, width); the reverse of `place_rotated`.

    Args:
        run: (tokens, width).
        order: places of the rows, all different, the language expert's first.
        language: number of rows of the language expert.
    """
    language_rows, vision_rows = _TakeByExpert.apply(run, order, language)
    return language_rows, vision_rows


__all__ = [
    "Parts",
    "add_by_expert",
    "gather_rows",
    "norm_by_expert",
    "place_rotated",
    "swiglu",
    "take_by_expert",
]
