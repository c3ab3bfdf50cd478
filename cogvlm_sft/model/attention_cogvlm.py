"""Attention of the decoder: QKV and output projection per expert, two ways to run it.

Over a grid (batch, length), with padding, a cache and any of transformers' implementations; or over
a flat run of segments without padding (`segment_attention`), which is how training goes. There the
last layer computes queries only where they are read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_cogvlm import CogVLMConfig
from .expert_rows import Parts, gather_rows, place_rotated, take_by_expert
from .linear_cogvlm import apply_linear, is_plain, linear
from .segment_attention import AttentionPlan, attend
from .token_layout import Routing
from .vision_cogvlm import eager_attention

Angles = tuple[torch.Tensor, torch.Tensor]


def inverse_frequencies(config: CogVLMConfig, device: torch.device | None = None) -> torch.Tensor:
    """(head size / 2,) rotary frequencies in fp32, from the configuration's RoPE base."""
    size = config.hidden_size // config.num_attention_heads
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device=device) / size
    return 1.0 / config.rope_base**exponents


class CogVLMRotaryEmbedding(nn.Module):
    """Holder of the `inv_freq` entry of released files; the angles do not come from it.

    Released files store it in bf16, which bends the angles by up to 0.3 rad at position 256.
    """

    inv_freq: torch.Tensor

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=True)


class Reads(NamedTuple):
    """What the last layer computes when only some places of a run are read.

    Attributes:
        queries: (queries,) rows of the queries among the routed rows, the language expert's first.
        query_order: (queries,) number of each of them among the queries, in the run's order.
        query_places: (queries,) their places in the run, ascending.
        query_language: queries of the language expert.
        rows: (reads,) rows of the places that are read, the language expert's first.
        order: (reads,) number of each of them among the queries.
        language: reads of the language expert.
        plan: attention of these queries.
    """

    queries: torch.Tensor
    query_order: torch.Tensor
    query_places: torch.Tensor
    query_language: int
    rows: torch.Tensor
    order: torch.Tensor
    language: int
    plan: AttentionPlan


class Run(NamedTuple):
    """A flat run of tokens and how its rows are routed.

    Attributes:
        order: (tokens,) place in the run of each row, the language expert's first.
        language: rows of the language expert.
        angles: cosine and sine in fp32, (tokens, 1, head size / 2), in the run's order.
        plan: who sees whom.
    """

    order: torch.Tensor
    language: int
    angles: Angles
    plan: AttentionPlan


def _rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, halves paired (NeoX): states (batch, heads, length, head size)."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


class CogVLMAttention(nn.Module):
    """Causal attention over all tokens, with QKV and output projection per expert."""

    is_causal = True

    def __init__(self, config: CogVLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.widths = [width, *[config.num_key_value_heads * self.head_dim] * 2]
        fused = sum(self.widths)
        self.vision_expert_query_key_value = nn.Linear(width, fused, bias=config.is_cogvlm2)
        self.vision_expert_dense = nn.Linear(width, width, bias=False)
        self.language_expert_query_key_value = nn.Linear(width, fused, bias=False)
        self.language_expert_dense = nn.Linear(width, width, bias=False)
        self.rotary_emb = CogVLMRotaryEmbedding(config)

    def forward(
        self,
        parts: Parts,
        routing: Routing | Run,
        angles: Angles | None = None,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        reads: Reads | None = None,
        **kwargs: Any,
    ) -> tuple[Parts, torch.Tensor | None]:
        """Both experts' rows, (rows, hidden) each, to the same (or, with `reads`, fewer).

        Args:
            parts: normed rows of the language and of the visual expert.
            routing: where the rows stand; a `Run` for flat attention.
            angles: cosine and sine, (batch, 1, length, head size / 2), for a `Routing`.
            attention_mask: what `create_causal_mask` made, for a `Routing`.
            past_key_values: cache to read and extend, for a `Routing`.
            reads: the places of a `Run` whose output is read; None: all.
            **kwargs: for the attention implementation.

        Returns:
            The output and the attention weights, where the implementation gives them.
        """
        if isinstance(routing, Run):
            if reads is None:
                query, key, value = self._project(parts, routing)
                plan, order, language = routing.plan, routing.order, routing.language
            else:
                query, key, value = self._project_reads(parts, routing, reads)
                plan, order, language = reads.plan, reads.order, reads.language
            query, key, value = (
                part.unflatten(-1, (-1, self.head_dim)) for part in (query, key, value)
            )
            output = attend(query, key, value, plan, self.scaling).flatten(1)
            return self._output(take_by_expert(output, order, language)), None
        fused = [apply_linear(self.language_expert_query_key_value, parts[0])]
        if not routing.single:
            fused.append(apply_linear(self.vision_expert_query_key_value, parts[1]))
        query, key, value = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in routing.scatter(*fused).split(self.widths, dim=-1)
        )
        assert angles is not None
        cosine, sine = (part.to(query.dtype) for part in angles)
        query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        compute = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention
        )
        output, weights = compute(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        gathered = routing.gather(output.flatten(2))
        if routing.single:
            return (apply_linear(self.language_expert_dense, gathered), parts[1]), weights
        return self._output(routing.split(gathered)), weights

    def _output(self, parts: Parts) -> Parts:
        return apply_linear(self.language_expert_dense, parts[0]), apply_linear(
            self.vision_expert_dense, parts[1]
        )

    def _project(self, parts: Parts, run: Run) -> tuple[torch.Tensor, ...]:
        """Rotated queries and keys, and values, (tokens, width) each, in the run's order."""
        fused = (
            apply_linear(self.language_expert_query_key_value, parts[0]),
            apply_linear(self.vision_expert_query_key_value, parts[1]),
        )
        heads = sum(self.widths[:2]) // self.head_dim
        return place_rotated(fused, run.order, run.angles, self.widths, heads)

    def _project_reads(self, parts: Parts, run: Run, reads: Reads) -> tuple[torch.Tensor, ...]:
        """As `_project`, with queries only where the last layer needs them."""
        experts = (self.language_expert_query_key_value, self.vision_expert_query_key_value)
        if not all(is_plain(expert) for expert in experts):
            query, key, value = self._project(parts, run)
            return query.index_select(0, reads.query_places), key, value
        language, vision = reads.queries.tensor_split([reads.query_language])
        asking = (gather_rows(parts[0], language), gather_rows(parts[1], vision - run.language))
        queries, rest = [], []
        for expert, rows, some in zip(experts, parts, asking, strict=True):
            cut = [self.widths[0], sum(self.widths[1:])]
            weights = expert.weight.split(cut)
            biases = (None, None) if expert.bias is None else expert.bias.split(cut)
            queries.append(linear(some, weights[0], biases[0]))
            rest.append(linear(rows, weights[1], biases[1]))
        at_queries = tuple(part[reads.query_places] for part in run.angles)
        (query,) = place_rotated(
            (queries[0], queries[1]),
            reads.query_order,
            (at_queries[0], at_queries[1]),
            self.widths[:1],
            self.widths[0] // self.head_dim,
        )
        key, value = place_rotated(
            (rest[0], rest[1]),
            run.order,
            run.angles,
            self.widths[1:],
            self.widths[1] // self.head_dim,
        )
        return query, key, value


__all__ = [
    "Angles",
    "CogVLMAttention",
    "CogVLMRotaryEmbedding",
    "Reads",
    "Run",
    "inverse_frequencies",
]
