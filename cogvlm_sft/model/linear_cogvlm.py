"""Linear layers by the faster of torch's two CPU libraries.

In fp32, torch multiplies by MKL, which on processors that are not Intel's stops at AVX2: on an AMD
with AVX-512 half of the machine is idle. oneDNN, which torch carries too, uses all of it; torch
hands it fp32 products only in compiled inference, by the operator called here. Everywhere else (a
GPU, other dtypes, autocast, compiled code, small products, `torch.backends.mkldnn.enabled = False`)
the layer is called as it is, and so are adapters and quantised layers: the layers of the model stay
`nn.Linear`, which bitsandbytes asks for to the letter. The choice depends on the machine and the
shapes alone, never on a timing, so that runs stay reproducible.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .expert_rows import swiglu

# Multiply-adds below which preparing oneDNN's kernels costs more than it saves: where autograd
# records, whose backward pass takes two more, and where it does not, above all in decoding.
_SMALL, _SMALL_UNRECORDED = 1 << 22, 1 << 18
_PART = 4096  # outputs of a weight gradient at once


@cache
def _onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, and torch can use it."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(
        torch.ops.mkldnn, "_linear_pointwise"
    ):
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def _multiply(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`rows @ weight.T + bias` by oneDNN; either factor may be transposed."""
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product


def _weight_gradient(gradient: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`gradient.T @ rows`; a vocabulary's in parts, since oneDNN copies the transposed factor."""
    outputs = gradient.shape[1]
    if outputs <= _PART:
        return _multiply(gradient.t(), rows.t())
    found = rows.new_empty(outputs, rows.shape[1])
    for part, some in zip(found.split(_PART), gradient.split(_PART, dim=1), strict=True):
        part.copy_(_multiply(some.t(), rows.t()))
    return found


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        # As torch does: beside frozen weights the rows are not kept.
        of_rows, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(rows if of_weight else None, weight if of_rows else None)
        return _multiply(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        return (
            _multiply(gradient, weight.t()) if of_rows else None,
            _weight_gradient(gradient, rows) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )


def linear(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`functional.linear`, by oneDNN where that is faster.

    Args:
        rows: (..., inputs).
        weight: (outputs, inputs).
        bias: (outputs,) or None.

    Returns:
        (..., outputs).
    """
    if (
        type(rows) is torch.Tensor
        and rows.device.type == "cpu"
        and rows.dtype == weight.dtype == torch.float32
        and rows.numel() * weight.shape[0]
        >= (_SMALL if torch.is_grad_enabled() else _SMALL_UNRECORDED)
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # called directly by the last layer
        and _onednn_is_faster()
    ):
        product: torch.Tensor = _Linear.apply(rows.reshape(-1, rows.shape[-1]), weight, bias)
        return product.view(*rows.shape[:-1], -1)
    return functional.linear(rows, weight, bias)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is no more than its weight and bias, which may then be used directly.

    Not where it is an adapter's or quantised, watched by hooks, moved by accelerate, or gathered by
    DeepSpeed ZeRO-3 only while the module itself is called.
    """
    return (
        type(layer) is nn.Linear
        and not hasattr(layer.weight, "ds_id")
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
        and "forward" not in layer.__dict__
    )


def apply_linear(layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """`layer(rows)`: (..., inputs) to (..., outputs)."""
    if not torch.compiler.is_compiling() and is_plain(layer):
        return linear(rows, layer.weight, layer.bias)  # type: ignore[arg-type]
    result: torch.Tensor = layer(rows)
    return result


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear(functional.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        activated = functional.silu(gate)
        of_weight = None
        if ctx.needs_input_grad[2]:
            inner = activated * up
            of_weight = linear(gradient.t(), inner.t()).to(weight.dtype)
            del inner
        of_inner = linear(gradient, weight.t().to(gradient.dtype))
        of_up = activated.mul_(of_inner)
        return torch.ops.aten.silu_backward(of_inner.mul_(up), gate), of_up, of_weight


def apply_gated_linear(layer: nn.Module, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`layer(silu(gate) * up)`, the product computed a second time instead of kept.

    Args:
        layer: linear, without a bias.
        gate: (rows, inputs).
        up: (rows, inputs).

    Returns:
        (rows, outputs).
    """
    if not torch.compiler.is_compiling() and is_plain(layer):
        result: torch.Tensor = _GatedLinear.apply(gate, up, layer.weight)
        return result
    return apply_linear(layer, swiglu(gate, up))


__all__ = ["apply_gated_linear", "apply_linear", "is_plain", "linear"]
