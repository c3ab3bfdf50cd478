"""A padded grid, or a packed row, as one flat run: what the layers of a training step work on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .attention_cogvlm import Angles, Reads, Run
from .segment_attention import plan_attention
from .segments import Segment, query_starts
from .token_layout import Routing

# Implementations whose attention over a run is here; others keep the padded grid.
FLAT_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")


def flatten(
    routing: Routing,
    segments: Sequence[Segment],
    angles: Angles,
    attention_mask: torch.Tensor | None,
    dtype: torch.dtype,
    implementation: str,
) -> tuple[Run, torch.Tensor | None]:
    """Leaves padding out of a routed batch.

    Args:
        routing: of the grid (batch, length).
        segments: of the run of its real tokens.
        angles: cosine and sine of the grid, (batch, 1, length, head size / 2).
        attention_mask: (batch, length), 1 on real tokens; None means that all are.
        dtype: of the attention's states.
        implementation: of attention.

    Returns:
        The run, and for each place of the grid its place in the run (None: the same).
    """
    device = angles[0].device
    turned = [part[:, 0].flatten(0, 1)[:, None] for part in angles]
    order, where = routing.order, None
    if order is None:
        order = torch.arange(routing.batch * routing.length, device=device)
    if attention_mask is not None and segments[-1].end < routing.batch * routing.length:
        real = attention_mask.flatten().to(torch.bool)
        where = real.cumsum(0) - 1
        order = where[order]
        turned = [part[real] for part in turned]
    plan = plan_attention(segments, None, device, dtype, implementation)
    return Run(order, routing.language, (turned[0], turned[1]), plan), where


def choose_reads(
    run: Run,
    segments: Sequence[Segment],
    places: torch.Tensor,
    dtype: torch.dtype,
    implementation: str,
) -> tuple[Reads, torch.Tensor | None]:
    """Restricts the last layer to what is read of it.

    Args:
        run: the run.
        segments: its segments.
        places: (reads,) ascending places in the run.
        dtype: of the attention's states.
        implementation: of attention.

    Returns:
        What the last layer computes, and the permutation that brings its rows into the order of
        `places` (None: they are).
    """
    device = places.device
    starts = query_starts(segments, places.tolist())
    spans = [torch.arange(s, segment.end) for s, segment in zip(starts, segments, strict=True)]
    query_places = torch.cat(spans).to(device)
    row_of = torch.empty_like(run.order)
    row_of[run.order] = torch.arange(run.order.numel(), device=device)
    queries, query_order = row_of[query_places].sort()
    rows, original = row_of[places].sort()
    asking, reading = torch.stack(
        ((queries < run.language).sum(), (rows < run.language).sum())
    ).tolist()
    reads = Reads(
        queries=queries,
        query_order=query_order,
        query_places=query_places,
        query_language=asking,
        rows=rows,
        order=torch.searchsorted(query_places, places)[original],
        language=reading,
        plan=plan_attention(segments, starts, device, dtype, implementation),
    )
    # Within an expert, rows keep the run's order: only a mixture of experts is out of it.
    return reads, None if reading in (0, places.numel()) else original.argsort()


__all__ = ["FLAT_ATTENTION", "choose_reads", "flatten"]
