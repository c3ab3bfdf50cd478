"""Which tokens of a flat run see which: causal segments, and the prefixes that branches share.

A training batch is computed as one run of real tokens without padding, cut into segments. A segment
is a conversation; or the part of several conversations that is the same, BOS and a picture up to
its last patch (a prefix); or what follows it in one of them, from its own eoi on (a branch). Tokens
see what stands before them in their own segment and, in a branch, the whole prefix; never another
segment. The last layer asks only for the queries from a segment's first supervised position on.
Everything here is plain integers on the host, made once a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from cogvlm_sft.errors import ModelInputError

# Own causal attention longer than this is computed as two triangles and a square: torch's CPU
# kernel works on whole blocks of 512 keys and would compute the hidden half as well.
_TRIANGLE = 160


class Segment(NamedTuple):
    """A stretch [start, end) of the run; `prefix` is the number of the segment it sees, or -1."""

    start: int
    end: int
    prefix: int = -1


class Part(NamedTuple):
    """`repeats` equal blocks of attention, each its steps further on: queries against keys."""

    query: int
    queries: int
    query_step: int
    key: int
    keys: int
    key_step: int
    repeats: int
    causal: int


def segments_of_rows(lengths: Sequence[int]) -> list[Segment]:
    """One segment a row, without prefixes."""
    found, start = [], 0
    for length in lengths:
        found.append(Segment(start, start + length))
        start += length
    return found


def read_segments(table: torch.Tensor, length: int) -> list[Segment]:
    """Checks a table of segments and brings it to the host.

    Args:
        table: (segments, 3): start, end, number of the prefix or -1.
        length: tokens of the run.

    Raises:
        ModelInputError: the segments leave gaps, or a prefix is not a segment before without one.
    """
    found = [Segment(*row) for row in table.tolist()]
    at = 0
    for number, segment in enumerate(found):
        prefix = segment.prefix
        legal = -1 <= prefix < number and (prefix < 0 or found[prefix].prefix < 0)
        if segment.start != at or segment.end <= at or not legal:
            raise ModelInputError(
                f"segment {number} is {tuple(segment)}; expected (start, end, prefix) with start "
                f"{at}, a later end, and as prefix -1 or an earlier segment without a prefix"
            )
        at = segment.end
    if at != length:
        raise ModelInputError(f"the segments cover {at} tokens of a run of {length}")
    return found


def query_starts(segments: Sequence[Segment], reads: Sequence[int]) -> list[int]:
    """Where the queries of each segment start if only the places `reads` (ascending) are read.

    A segment that is not read has none: its end is returned.
    """
    starts, at = [], 0
    for segment in segments:
        while at < len(reads) and reads[at] < segment.start:
            at += 1
        inside = at < len(reads) and reads[at] < segment.end
        starts.append(reads[at] if inside else segment.end)
    return starts


def attention_parts(segments: Sequence[Segment], starts: Sequence[int] | None = None) -> list[Part]:
    """Cuts the attention over a run into blocks that one kernel call each can compute.

    Args:
        segments: of the run.
        starts: first query of each segment (see `query_starts`); None: all are queries. Queries
            are numbered as they follow each other, keys by their place in the run.

    Returns:
        Causal blocks first, one for every query, then blocks of keys that all their queries see.
    """
    triangles: list[Part] = []
    squares: list[Part] = []

    def own(query: int, key: int, count: int) -> None:
        """Causal attention of `count` tokens to themselves."""
        if count <= _TRIANGLE:
            triangles.append(Part(query, count, 0, key, count, 0, 1, 1))
            return
        half = (count + 1) // 2
        own(query, key, half)
        own(query + half, key + half, count - half)
        squares.append(Part(query + half, count - half, 0, key, half, 0, 1, 0))

    query = 0
    of_prefix: dict[int, list[int]] = {}
    for number, segment in enumerate(segments):
        first = segment.start if starts is None else starts[number]
        count = segment.end - first
        if not count:
            continue
        own(query, first, count)
        if first > segment.start:
            squares.append(Part(query, count, 0, segment.start, first - segment.start, 0, 1, 0))
        if segment.prefix >= 0:
            spans = of_prefix.setdefault(segment.prefix, [])
            if spans and spans[-1] == query:
                spans[-1] = query + count  # branches that follow each other make one block
            else:
                spans += [query, query + count]
        query += count
    for prefix, spans in of_prefix.items():
        shared = segments[prefix]
        for low, high in zip(spans[::2], spans[1::2], strict=True):
            squares.append(
                Part(low, high - low, 0, shared.start, shared.end - shared.start, 0, 1, 0)
            )
    return [*_batched(triangles), *_batched(squares)]


def _batched(parts: list[Part]) -> list[Part]:
    """Joins blocks of one shape that stand at equal distances."""
    by_shape: dict[tuple[int, int, int], list[Part]] = {}
    for part in parts:
        by_shape.setdefault((part.queries, part.keys, part.causal), []).append(part)
    joined: list[Part] = []
    for alike in by_shape.values():
        current = alike[0]
        for part in alike[1:]:
            steps = (
                part.query - current.query - (current.repeats - 1) * current.query_step,
                part.key - current.key - (current.repeats - 1) * current.key_step,
            )
            if min(steps) > 0 and (
                current.repeats == 1 or steps == (current.query_step, current.key_step)
            ):
                current = current._replace(
                    query_step=steps[0], key_step=steps[1], repeats=current.repeats + 1
                )
            else:
                joined.append(current)
                current = part
        joined.append(current)
    return joined


__all__ = [
    "Part",
    "Segment",
    "attention_parts",
    "query_starts",
    "read_segments",
    "segments_of_rows",
]
