"""The custom operator behind `segment_attention`: flash kernels, a block at a time.

Exact by the log-sum-exp of each block: the forward pass merges blocks by it, the backward pass
calls each block's kernel with the *merged* output and log-sum-exp. torch's kernels are called by
their operators, because the public functions return no log-sum-exp (on a CPU) or cannot be
differentiated through it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .segments import Segment, attention_parts


def cpu_plan(segments: Sequence[Segment], starts: Sequence[int] | None) -> list[torch.Tensor]:
    """The operator's `plan` on a CPU: one (parts, 8) table, see `segments.Part`."""
    parts = attention_parts(segments, starts)
    return [torch.tensor(parts, dtype=torch.int64).view(-1, 8)]


def cuda_plan(
    segments: Sequence[Segment], starts: Sequence[int] | None, device: torch.device
) -> list[torch.Tensor]:
    """The operator's `plan` on a GPU: two variable-length calls, and who takes part in the second.

    Returns:
        [bounds of queries, bounds of keys, longest (4,), rows of branch queries, rows of prefix
        keys, bounds of the branch queries, bounds of the prefix keys].
    """
    firsts = [segment.start for segment in segments] if starts is None else list(starts)
    counts = [segment.end - first for segment, first in zip(segments, firsts, strict=True)]
    lengths = [segment.end - segment.start for segment in segments]
    at = [0]
    for count in counts:
        at.append(at[-1] + count)
    asking: dict[int, list[int]] = {}
    for number, segment in enumerate(segments):
        if segment.prefix >= 0 and counts[number]:
            asking.setdefault(segment.prefix, []).extend(range(at[number], at[number + 1]))
    branches = [row for rows in asking.values() for row in rows]
    prefixes = [row for number in asking for row in range(*segments[number][:2])]
    shared_queries = [len(rows) for rows in asking.values()]
    shared_keys = [lengths[number] for number in asking]
    longest = [
        max(counts),
        max(lengths),
        max(shared_queries, default=0),
        max(shared_keys, default=0),
    ]

    def bounds(sizes: list[int]) -> torch.Tensor:
        return torch.tensor([0, *sizes]).cumsum(0).to(device, torch.int32, non_blocking=True)

    def rows(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.long).to(device, non_blocking=True)

    return [
        bounds(counts),
        bounds(lengths),
        torch.tensor(longest),
        rows(branches),
        rows(prefixes),
        bounds(shared_queries),
        bounds(shared_keys),
    ]


@torch.library.custom_op("cogvlm_sft::segment_attention", mutates_args=(), device_types="cpu")
def segment_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: list[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    output = query.new_empty(query.shape, dtype=wide)
    sums = query.new_empty(query.shape[:2], dtype=wide)
    for q, nq, q_step, k, nk, k_step, count, causal in plan[0].tolist():
        found, found_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            _blocks(query, q, nq, q_step, count),
            _blocks(key, k, nk, k_step, count),
            _blocks(value, k, nk, k_step, count),
            0.0,
            bool(causal),
            scale=scale,
        )
        so_far = _blocks(output, q, nq, q_step, count)
        sums_so_far = _blocks(sums, q, nq, q_step, count)
        if causal:
            so_far.copy_(found)
            sums_so_far.copy_(found_sums)
        else:
            share = torch.sigmoid(found_sums - sums_so_far)
            so_far.lerp_(found.to(wide), share[..., None])
            sums_so_far.copy_(torch.logaddexp(sums_so_far, found_sums))
    return output.to(query.dtype), sums


@torch.library.custom_op(
    "cogvlm_sft::segment_attention_backward", mutates_args=(), device_types="cpu"
)
def segment_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    plan: list[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    # Where all tokens are queries, the causal blocks come first and write every key.
    fresh = torch.empty if query.shape[0] == key.shape[0] else torch.zeros
    grad_query = torch.empty(query.shape, dtype=wide)
    grad_key, grad_value = (fresh(key.shape, dtype=wide) for _ in range(2))
    for q, nq, q_step, k, nk, k_step, count, causal in plan[0].tolist():
        queries = (q, nq, q_step, count)
        keys = (k, nk, k_step, count)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _blocks(gradient, *queries),
            _blocks(query, *queries),
            _blocks(key, *keys),
            _blocks(value, *keys),
            _blocks(output, *queries),
            _blocks(sums, *queries),
            0.0,
            bool(causal),
            scale=scale,
        )
        places = (queries, keys, keys)
        for whole, place, part in zip(
            (grad_query, grad_key, grad_value), places, found, strict=True
        ):
            if causal:
                _blocks(whole, *place).copy_(part)
            else:
                _blocks(whole, *place).add_(part)
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _blocks(states: torch.Tensor, start: int, length: int, step: int, count: int) -> torch.Tensor:
    """(tokens, heads, ...) to (count, heads, length, ...): a view of blocks `step` apart."""
    token, head, *rest = states.stride()
    return states.as_strided(
        (count, states.shape[1], length, *states.shape[2:]),
        (step * token, head, token, *rest),
        states.storage_offset() + start * token,
    )


@segment_attention.register_kernel("cuda")
def _cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: list[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not query.shape[0]:  # nothing is read: FlashAttention cannot launch on no queries
        return torch.empty_like(query), query.new_empty(query.shape[1], 0, dtype=torch.float32)
    own, shared = _calls(plan)
    output, sums = _flash(query, key, value, own, scale)
    if shared is None:
        return output, sums
    branches, prefixes = plan[3], plan[4]
    parts = (query[branches], key[prefixes], value[prefixes])
    found, found_sums = _flash(*parts, shared, scale)
    so_far, sums_so_far = output[branches].float(), sums[:, branches]
    share = torch.sigmoid(found_sums - sums_so_far).transpose(0, 1)[..., None]
    merged = so_far.lerp_(found.float(), share).to(output.dtype)
    output = output.index_copy(0, branches, merged)
    sums = sums.index_copy(1, branches, torch.logaddexp(sums_so_far, found_sums))
    return output, sums


@segment_attention_backward.register_kernel("cuda")
def _cuda_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    plan: list[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if not query.shape[0]:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    own, shared = _calls(plan)
    gradient = gradient.contiguous()
    grads = _flash_backward(gradient, query, key, value, output, sums, own, scale)
    if shared is None:
        return grads
    branches, prefixes = plan[3], plan[4]
    found = _flash_backward(
        gradient[branches],
        query[branches],
        key[prefixes],
        value[prefixes],
        output[branches],
        sums[:, branches].contiguous(),
        shared,
        scale,
    )
    for whole, rows, part in zip(grads, (branches, prefixes, prefixes), found, strict=True):
        whole.index_add_(0, rows, part)
    return grads


class _Call(NamedTuple):
    """One variable-length flash call: bounds of queries and keys, longest of each, causal or not.

    Causal means aligned at the end: the last query sees the last key (torch's SDPA `is_causal` is
    aligned at the beginning, which is wrong where queries are fewer than keys).
    """

    queries: torch.Tensor
    keys: torch.Tensor
    longest_queries: int
    longest_keys: int
    causal: bool


def _calls(plan: list[torch.Tensor]) -> tuple[_Call, _Call | None]:
    """The call within segments, and that of branches to their prefixes if there are any."""
    own_queries, own_keys, shared_queries, shared_keys = plan[2].tolist()
    own = _Call(plan[0], plan[1], own_queries, own_keys, True)
    if not shared_queries:
        return own, None
    return own, _Call(plan[5], plan[6], shared_queries, shared_keys, False)


def _flash(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: _Call, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (queries, heads, head size) and log-sum-exp (heads, queries)."""
    found = torch.ops.aten._flash_attention_forward(
        query, key, value, call.queries, call.keys, call.longest_queries, call.longest_keys,
        0.0, call.causal, False, scale=scale,
    )  # fmt: skip
    return found[0], found[1]


def _flash_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    call: _Call,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # Without dropout the random state is not read.
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)
    return torch.ops.aten._flash_attention_backward(
        gradient, query, key, value, output, sums, call.queries, call.keys,
        call.longest_queries, call.longest_keys, 0.0, call.causal, state, state, scale=scale,
    )  # fmt: skip


@segment_attention.register_fake
def _shapes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: list[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    heads, queries = query.shape[1], query.shape[0]
    sums = (heads, queries) if query.device.type == "cuda" else (queries, heads)
    return query.new_empty(query.shape), query.new_empty(sums, dtype=wide)


@segment_attention_backward.register_fake
def _backward_shapes(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    sums: torch.Tensor,
    plan: list[torch.Tensor],
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query_like, key_like, value_like = (part.new_empty(part.shape) for part in (query, key, value))
    return query_like, key_like, value_like


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, plan, scale = inputs
    ctx.save_for_backward(query, key, value, *output, *plan)
    ctx.scale = scale


def _gradients(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    query, key, value, output, sums, *plan = ctx.saved_tensors
    grads = segment_attention_backward(gradient, query, key, value, output, sums, plan, ctx.scale)
    return (*grads, [None] * len(plan), None)


segment_attention.register_autograd(_gradients, setup_context=_keep)


__all__ = ["cpu_plan", "cuda_plan", "segment_attention"]
