"""Attention over segments and shared prefixes: every way equals the dense mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_sft.model import segment_kernels
from cogvlm_sft.model.segment_attention import attend, plan_attention
from cogvlm_sft.model.segments import Segment, attention_parts, query_starts, segments_of_rows

CPU = torch.device("cpu")


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[Segment], list[int] | None]:
    """Segments with and without prefixes, and where queries start (or None: everywhere)."""
    segments: list[Segment] = []
    at = 0
    for _ in range(draw(st.integers(1, 4))):
        branches = draw(st.lists(st.integers(1, 40), max_size=4))
        length = draw(st.integers(1, 400 if draw(st.booleans()) else 12))
        segments.append(Segment(at, at + length))
        at += length
        prefix = len(segments) - 1
        for branch in branches:
            segments.append(Segment(at, at + branch, prefix))
            at += branch
    if draw(st.booleans()):
        return segments, None
    return segments, [draw(st.integers(s.start, s.end)) for s in segments]


def states(segments: list[Segment], starts: list[int] | None, heads: int, key_heads: int):
    tokens = segments[-1].end
    queries = tokens if starts is None else sum(
        s.end - first for s, first in zip(segments, starts, strict=True)
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, 8, generator=generator, dtype=torch.float64)

    return draw(queries, heads), draw(tokens, key_heads), draw(tokens, key_heads)


def by(implementation: str, segments, starts, inputs, gradient):
    inputs = [part.clone().requires_grad_() for part in inputs]
    plan = plan_attention(segments, starts, CPU, torch.float64, implementation)
    output = attend(*inputs, plan, 0.3)
    return output, *torch.autograd.grad(output, inputs, gradient)


@given(runs(), st.sampled_from([(2, 2), (4, 2)]))
@settings(max_examples=40)
def test_flash_blocks_equal_the_dense_mask(run, heads):
    segments, starts = run
    inputs = states(segments, starts, *heads)
    gradient = torch.randn(inputs[0].shape, dtype=torch.float64)
    expected = by("eager", segments, starts, inputs, gradient)
    found = by("sdpa", segments, starts, inputs, gradient)
    for left, right in zip(found, expected, strict=True):
        # eager's softmax is in fp32
        torch.testing.assert_close(left, right, atol=2e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")  # FlexAttention says that it is not compiled here
def test_block_mask_equals_the_dense_mask():
    """Forward only: FlexAttention has no backward pass on a CPU."""
    segments = [Segment(0, 50), Segment(50, 60, 0), Segment(60, 75, 0), Segment(75, 200)]
    for starts in (None, [50, 55, 60, 190]):
        inputs = [part.float() for part in states(segments, starts, 4, 2)]
        outputs = []
        for implementation in ("eager", "flex_attention"):
            plan = plan_attention(segments, starts, CPU, torch.float32, implementation)
            outputs.append(attend(*inputs, plan, 0.3))
        torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)


def _visible(call, queries: int, keys: int) -> torch.Tensor:
    """What FlashAttention-2 lets each query of a variable-length call see."""
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    bounds = zip(call.queries.tolist(), call.queries[1:].tolist(),
                 call.keys.tolist(), call.keys[1:].tolist(), strict=False)  # fmt: skip
    for q, q_end, k, k_end in bounds:
        assert q_end - q <= call.longest_queries and k_end - k <= call.longest_keys
        block = torch.ones(q_end - q, k_end - k, dtype=torch.bool)
        # Aligned at the end: the last query sees the last key.
        mask[q:q_end, k:k_end] = block.tril((k_end - k) - (q_end - q)) if call.causal else block
    return mask


def _scores(query, key, call, scale):
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * scale
    return scores.masked_fill(~_visible(call, len(query), len(key)), float("-inf"))


def _stand_in(query, key, value, call, scale):
    assert call.longest_queries, "the kernel would be launched on an empty grid"
    scores = _scores(query, key, call, scale)
    groups = query.shape[1] // key.shape[1]
    weights = scores.softmax(-1)
    output = torch.einsum("hqk,khd->qhd", weights, value.repeat_interleave(groups, 1))
    return output, scores.logsumexp(-1)


def _stand_in_backward(gradient, query, key, value, output, sums, call, scale):
    """By the merged output and log-sum-exp, as the kernel computes it."""
    groups, heads = query.shape[1] // key.shape[1], key.shape[1]
    weights = (_scores(query, key, call, scale) - sums[..., None]).exp()
    wide_key, wide_value = (part.repeat_interleave(groups, 1) for part in (key, value))
    along = (gradient * output).sum(-1).T[..., None]
    inner = weights * (torch.einsum("qhd,khd->hqk", gradient, wide_value) - along) * scale
    grads = (
        torch.einsum("hqk,khd->qhd", inner, wide_key),
        torch.einsum("hqk,qhd->khd", inner, query),
        torch.einsum("hqk,qhd->khd", weights, gradient),
    )
    return grads[0], *(part.unflatten(1, (heads, groups)).sum(2) for part in grads[1:])


@given(runs(), st.sampled_from([(2, 2), (4, 2)]))
@settings(max_examples=25)
def test_the_gpu_calls_equal_the_dense_mask(run, heads):
    """Their bounds, rows and merging, with FlashAttention-2 written out in its place."""
    segments, starts = run
    inputs = tuple(part.float() for part in states(segments, starts, *heads))
    gradient = torch.randn(inputs[0].shape)
    expected = by("eager", segments, starts, inputs, gradient)
    plan = segment_kernels.cuda_plan(segments, starts, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment_kernels, "_flash", _stand_in)
        patch.setattr(segment_kernels, "_flash_backward", _stand_in_backward)
        output, sums = segment_kernels._cuda(*inputs, plan, 0.3)
        grads = segment_kernels._cuda_backward(gradient, *inputs, output, sums, plan, 0.3)
    for left, right in zip((output, *grads), expected, strict=True):
        torch.testing.assert_close(left, right, atol=1e-4, rtol=1e-4)


def test_equal_rows_are_computed_together():
    parts = attention_parts(segments_of_rows([100] * 6))
    assert [(part.repeats, part.queries, part.causal) for part in parts] == [(6, 100, 1)]
    # Branches of one picture are one block against it.
    shared = [Segment(0, 90), *(Segment(90 + 10 * n, 100 + 10 * n, 0) for n in range(5))]
    parts = attention_parts(shared)
    assert [(p.repeats, p.queries, p.keys, p.causal) for p in parts] == [
        (1, 90, 90, 1), (5, 10, 10, 1), (1, 50, 90, 0),
    ]  # fmt: skip


def test_queries_start_at_the_first_place_that_is_read():
    segments = [Segment(0, 10), Segment(10, 20), Segment(20, 30)]
    assert query_starts(segments, [4, 7, 20]) == [4, 20, 20]
    assert query_starts(segments, []) == [10, 20, 30]
