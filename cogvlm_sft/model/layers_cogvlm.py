"""The decoder layer: norms shared by the experts, attention, and one SwiGLU per expert.

RMSNorm multiplies by its weight before the downcast, as the released code does and Llama does not.
Every expert is called for every batch, on no rows if need be: gradients then exist as zeros, and
sharded ranks stay in step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention_cogvlm import Angles, CogVLMAttention, Reads, Run
from .configuration_cogvlm import CogVLMConfig
from .expert_rows import Parts, add_by_expert, norm_by_expert
from .linear_cogvlm import apply_gated_linear, apply_linear
from .token_layout import Routing, gather_rows


class CogVLMRMSNorm(nn.Module):
    """RMSNorm in fp32, weight included, then cast back."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(
        self, hidden_states: torch.Tensor, language: int | None = None
    ) -> torch.Tensor | Parts:
        """(..., width) to the same; cut into the two experts' rows behind the first `language`."""
        if language is not None:
            return norm_by_expert(hidden_states, self.weight, self.eps, language)
        normed = functional.rms_norm(
            hidden_states.float(), self.weight.shape, self.weight.float(), self.eps
        )
        return normed.to(hidden_states.dtype)


class CogVLMMLP(nn.Module):
    """SwiGLU of one expert."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)
        self.activation = None if config.hidden_act == "silu" else ACT2FN[config.hidden_act]

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) to the same."""
        gate, up = apply_linear(self.gate_proj, rows), apply_linear(self.up_proj, rows)
        if self.activation is None:
            return apply_gated_linear(self.down_proj, gate, up)
        return apply_linear(self.down_proj, self.activation(gate) * up)


class CogVLMExpertMLP(nn.Module):
    """The two experts' MLPs."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.language_mlp = CogVLMMLP(config)
        self.vision_mlp = CogVLMMLP(config)

    def forward(self, parts: Parts, single: bool = False) -> Parts:
        """Both experts' rows, (rows, hidden) each, to the same; `single`: language rows only."""
        language = self.language_mlp(parts[0])
        return language, parts[1] if single else self.vision_mlp(parts[1])


class CogVLMDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm decoder layer; the norms are shared by the experts.

    Attributes:
        recompute_mlp: keep what attention needs for the backward pass and compute the MLP, which
            takes two thirds of the memory and no attention kernel, a second time.
    """

    def __init__(self, config: CogVLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = CogVLMAttention(config, layer_idx)
        self.mlp = CogVLMExpertMLP(config)
        self.input_layernorm = CogVLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = CogVLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.recompute_mlp = False

    def forward(
        self,
        rows: torch.Tensor,
        routing: Routing | Run,
        angles: Angles | None = None,
        attention_mask: Any = None,
        past_key_values: Cache | None = None,
        reads: Reads | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Routed rows (rows, hidden) to the same.

        Args:
            rows: hidden states in the order of `routing`.
            routing: which rows are whose, and where they stand in the batch or in the run.
            angles: cosine and sine, (batch, 1, length, head size / 2), for a `Routing`.
            attention_mask: what `create_causal_mask` made, for a `Routing`.
            past_key_values: cache to read and extend, for a `Routing`.
            reads: the only places of a `Run` whose output is read: keys and values are computed
                for all tokens, what follows for these alone.
            **kwargs: for the attention implementation.
        """
        attended, _ = self.self_attn(
            self.input_layernorm(rows, routing.language),
            routing,
            angles,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            reads=reads,
            **kwargs,
        )
        language = routing.language
        if reads is not None:
            rows, language = gather_rows(rows, reads.rows), reads.language
        rows = add_by_expert(rows, attended)
        single = isinstance(routing, Routing) and routing.single
        if self.recompute_mlp and self.training and torch.is_grad_enabled():
            inner = checkpoint(self._mlp, rows, language, single, use_reentrant=False)
        else:
            inner = self._mlp(rows, language, single)
        return add_by_expert(rows, inner)

    def _mlp(self, rows: torch.Tensor, language: int, single: bool) -> Parts:
        return self.mlp(self.post_attention_layernorm(rows, language), single)


__all__ = ["CogVLMDecoderLayer", "CogVLMRMSNorm"]
