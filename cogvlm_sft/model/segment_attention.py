"""Attention over a flat run of segments and shared prefixes, without padding.

A block of queries against its own segment and one against the shared prefix are computed by
ordinary flash kernels and merged by their log-sum-exp, so nothing is copied for a branch and no
mask is built. On a CPU the blocks are those of `segments.attention_parts`; on a GPU they are two
variable-length calls of the FlashAttention-2 that torch ships. Both are one custom operator
(`segment_kernels`), so that torch.compile sees no break. FlexAttention's block mask and a dense
mask are the other two ways, for other devices and dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .segment_kernels import cpu_plan, cuda_plan, segment_attention
from .segments import Segment

_HALF = (torch.float16, torch.bfloat16)


class AttentionPlan(NamedTuple):
    """What attention needs to know about a run; only tensors, so compiled code is reused.

    Attributes:
        kernels: argument of the custom operator, or empty.
        mask: dense mask (queries, keys), True where visible, or None.
        eager: with a mask, attention is written out instead of left to SDPA.
        blocks: FlexAttention's mask, or None.
    """

    kernels: list[torch.Tensor]
    mask: torch.Tensor | None = None
    eager: bool = False
    blocks: BlockMask | None = None


def plan_attention(
    segments: Sequence[Segment],
    starts: Sequence[int] | None,
    device: torch.device,
    dtype: torch.dtype,
    implementation: str,
) -> AttentionPlan:
    """Prepares attention for the layers of one forward pass.

    Args:
        segments: of the run.
        starts: first query of each segment; None: every token is a query.
        device: of the states.
        dtype: of queries, keys and values.
        implementation: `sdpa` and `flash_attention_2` take flash kernels where device and dtype
            have them, `flex_attention` a block mask; `eager`, and the rest, a dense mask.
    """
    if implementation == "flex_attention":
        return AttentionPlan([], blocks=_block_mask(segments, starts, device))
    if implementation != "eager":
        if device.type == "cpu":
            return AttentionPlan(cpu_plan(segments, starts))
        if device.type == "cuda" and dtype in _HALF:
            return AttentionPlan(cuda_plan(segments, starts, device))
    mask = _dense_mask(segments, starts, device)
    return AttentionPlan([], mask=mask, eager=implementation == "eager")


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
) -> torch.Tensor:
    """Attention of a run.

    Args:
        query: (queries, heads, head size).
        key: (tokens, key/value heads, head size); `value` likewise.
        plan: of `plan_attention`.
        scale: factor on the scores.

    Returns:
        (queries, heads, head size).
    """
    if plan.kernels:
        if key.shape[1] != query.shape[1] and query.device.type == "cpu":
            groups = query.shape[1] // key.shape[1]
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        output: torch.Tensor = segment_attention(query, key, value, plan.kernels, scale)[0]
        return output
    q, k, v = (part.transpose(0, 1)[None] for part in (query, key, value))
    grouped = key.shape[1] != query.shape[1]
    if plan.blocks is not None:
        compute: Any = _compiled_flex() if query.device.type == "cuda" else flex_attention
        found = compute(q, k, v, block_mask=plan.blocks, scale=scale, enable_gqa=grouped)
    elif plan.eager and plan.mask is not None:
        groups = query.shape[1] // key.shape[1]
        k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
        scores = (q @ k.transpose(2, 3) * scale).masked_fill(~plan.mask, float("-inf"))
        found = scores.softmax(dim=-1, dtype=torch.float32).to(v.dtype) @ v
    else:
        found = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=plan.mask, scale=scale, enable_gqa=grouped
        )
    return found[0].transpose(0, 1)


_flex: Any = None


def _compiled_flex() -> Any:
    """FlexAttention is only a kernel once compiled; done on first use, kept for the process."""
    global _flex
    if _flex is None:
        _flex = torch.compile(flex_attention, dynamic=True)
    return _flex


def _facts(
    segments: Sequence[Segment], starts: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Segment of each key, prefix of each key's segment, and place of each query."""
    lengths = torch.tensor([segment.end - segment.start for segment in segments])
    own = torch.arange(len(segments)).repeat_interleave(lengths)
    prefix = torch.tensor([segment.prefix for segment in segments]).repeat_interleave(lengths)
    if starts is None:
        return own, prefix, torch.arange(own.numel())
    kept = [torch.arange(s, segment.end) for s, segment in zip(starts, segments, strict=True)]
    return own, prefix, torch.cat(kept)


def _dense_mask(
    segments: Sequence[Segment], starts: Sequence[int] | None, device: torch.device
) -> torch.Tensor:
    own, prefix, places = (fact.to(device) for fact in _facts(segments, starts))
    keys = torch.arange(own.numel(), device=device)
    same = own[places][:, None] == own
    return (same | (prefix[places][:, None] == own)) & (keys <= places[:, None])


def _block_mask(
    segments: Sequence[Segment], starts: Sequence[int] | None, device: torch.device
) -> BlockMask:
    own, prefix, places = (fact.to(device) for fact in _facts(segments, starts))

    def visible(b: Any, h: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        place = places[query]
        return (key <= place) & ((own[place] == own[key]) | (prefix[place] == own[key]))

    return create_block_mask(visible, None, None, places.numel(), own.numel(), device=device)


__all__ = ["AttentionPlan", "attend", "plan_attention"]
