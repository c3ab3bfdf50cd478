"""The picture's way into CogVLM: EVA2-CLIP-E tower, GLU adapter, and the boi/eoi tokens around it.

The tower is post-norm in an unusual way: LayerNorm stands on the *output* of each sublayer, before
the residual is added, and nothing is normalised at the end (the released tower lost its last layer,
not only its pooling). A frozen tower runs without autograd and outside gradient checkpointing; a
batch without pictures still runs the adapter, and a trainable or sharded tower, on an empty picture
whose result is multiplied by zero, so that every rank of a sharded run computes the same modules.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from cogvlm_sft.errors import ModelInputError

from .configuration_cogvlm import CogVLMConfig, CogVLMVisionConfig
from .linear_cogvlm import apply_gated_linear, apply_linear


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out, with the softmax in fp32; serves the tower and the language model.

    Args:
        module: holder of `num_key_value_groups` (query heads a key/value head).
        query: (batch, heads, queries, head size).
        key: (batch, key/value heads, keys, head size); `value` likewise.
        attention_mask: additive, broadcast to (batch, heads, queries, keys), or None.
        scaling: factor on the scores.
        dropout: probability on the weights.
        **kwargs: arguments of other attention implementations.

    Returns:
        The output (batch, queries, heads, head size) and the weights (batch, heads, queries, keys).
    """
    groups = cast(int, module.num_key_value_groups)
    if groups > 1:
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class CogVLMPatchEmbedding(nn.Module):
    """Patches in row-major order behind a class token, plus learned positions."""

    def __init__(self, config: CogVLMVisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            config.in_channels,
            config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
        )
        self.cls_embedding = nn.Parameter(torch.zeros(1, config.hidden_size))
        self.position_embedding = nn.Embedding(config.num_positions, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(images, channels, side, side) to (images, 1 + patches, hidden)."""
        patches = self.proj(pixel_values.to(self.proj.weight.dtype)).flatten(2).transpose(1, 2)
        first = self.cls_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        return torch.cat((first, patches), dim=1) + self.position_embedding.weight


class CogVLMVisionAttention(nn.Module):
    """Full attention over the patches of one image; fused QKV with bias."""

    is_causal = False
    num_key_value_groups = 1

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.config = config
        vision = config.vision_config
        self.head_dim = vision.hidden_size // vision.num_heads
        self.scaling = self.head_dim**-0.5
        self.query_key_value = nn.Linear(vision.hidden_size, 3 * vision.hidden_size)
        self.dense = nn.Linear(vision.hidden_size, vision.hidden_size)
        self.output_dropout = nn.Dropout(vision.dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(images, tokens, hidden) to the same."""
        images, tokens, hidden = hidden_states.shape
        fused = apply_linear(self.query_key_value, hidden_states).view(
            images, tokens, 3, -1, self.head_dim
        )
        query, key, value = fused.permute(2, 0, 3, 1, 4).unbind(0)
        # The tower follows the language model unless it was given an implementation of its own.
        implementation = (
            self.config.vision_config._attn_implementation or self.config._attn_implementation
        )
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention)
        output, _ = attend(self, query, key, value, None, scaling=self.scaling, dropout=0.0)
        return self.output_dropout(apply_linear(self.dense, output.reshape(images, tokens, hidden)))


class CogVLMVisionMLP(nn.Module):
    """Two linears around an exact (erf) GELU."""

    def __init__(self, config: CogVLMVisionConfig) -> None:
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(..., hidden) to the same."""
        return apply_linear(self.fc2, self.activation(apply_linear(self.fc1, hidden_states)))


class CogVLMVisionLayer(GradientCheckpointingLayer):
    """One layer of the tower: `x + norm(attention(x))`, then `x + norm(mlp(x))`."""

    _checkpointing_asked = False

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        vision = config.vision_config
        self.attention = CogVLMVisionAttention(config)
        self.mlp = CogVLMVisionMLP(vision)
        self.input_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)

    @property
    def gradient_checkpointing(self) -> bool:
        """Checkpointing as asked for, except where nothing is kept anyway (a frozen tower)."""
        return self._checkpointing_asked and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self._checkpointing_asked = value

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(images, tokens, hidden) to the same."""
        hidden_states = hidden_states + self.input_layernorm(self.attention(hidden_states))
        return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


class CogVLMVisionTransformer(nn.Module):
    """The stack of layers."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            CogVLMVisionLayer(config) for _ in range(config.vision_config.num_hidden_layers)
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(images, tokens, hidden) to the same."""
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class CogVLMAdapter(nn.Module):
    """GLU from the tower's width to the language model's."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.linear_proj = nn.Linear(config.vision_config.hidden_size, width, bias=False)
        self.norm1 = nn.LayerNorm(width, eps=1e-5)  # eps of the released code, not a config key
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.dense_h_to_4h = nn.Linear(width, inner, bias=False)
        self.dense_4h_to_h = nn.Linear(inner, width, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(images, patches, tower's hidden) to (images, patches, hidden)."""
        hidden = functional.gelu(self.norm1(apply_linear(self.linear_proj, features)))
        rows = hidden.flatten(0, 1)
        gate, up = apply_linear(self.gate_proj, rows), apply_linear(self.dense_h_to_4h, rows)
        return apply_gated_linear(self.dense_4h_to_h, gate, up).view_as(hidden)


class CogVLMVisionModel(nn.Module):
    """Pixels to the embeddings of one image block: boi, patches, eoi."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__()
        self.config = config
        vision = config.vision_config
        self.patch_embedding = CogVLMPatchEmbedding(vision)
        self.transformer = CogVLMVisionTransformer(config)
        if config.is_cogvlm2:
            self.conv = nn.Conv2d(vision.hidden_size, vision.hidden_size, kernel_size=2, stride=2)
        self.linear_proj = CogVLMAdapter(config)
        self.boi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """Embeds images.

        Args:
            pixel_values: (images, channels, side, side), normalised as the image processor does;
                None for a batch without pictures, which calls the same modules (DeepSpeed ZeRO-3
                compares their order between ranks).

        Returns:
            (images, `config.num_image_tokens`, hidden), or the zero of `without_images`.

        Raises:
            ModelInputError: the pictures do not have the configuration's size.
        """
        if pixel_values is None:
            return self.without_images()
        vision = self.config.vision_config
        expected = (vision.in_channels, vision.image_size, vision.image_size)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ModelInputError(
                f"pixel_values have shape {tuple(pixel_values.shape)}; expected (images, "
                f"{', '.join(map(str, expected))}): use this checkpoint's own image processor"
            )
        return self._adapt(self._tower(pixel_values))

    def without_images(self) -> torch.Tensor:
        """A zero that depends on every parameter that a batch with pictures would use.

        Returns:
            A scalar 0 through which adapter, boi, eoi (and a trainable or sharded tower) receive
            zero gradients.
        """
        vision = self.config.vision_config
        # A module's own parameter: to look at another's, ZeRO-3 gathers it, on this rank alone.
        like = self.boi
        if self._tower_is_trainable() or _is_sharded(self.transformer):
            side = vision.image_size
            hidden = self._tower(like.new_zeros(1, vision.in_channels, side, side))
        else:
            patches = 4 if self.config.is_cogvlm2 else 1  # the smallest grid that conv accepts
            hidden = like.new_zeros(1, 1 + patches, vision.hidden_size)
        return self._adapt(hidden).float().mean() * 0.0

    def _tower(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._tower_is_trainable()):
            return self.transformer(self.patch_embedding(pixel_values))

    def _adapt(self, hidden: torch.Tensor) -> torch.Tensor:
        patches = hidden[:, 1:]  # the class token has no further use
        if self.config.is_cogvlm2:
            images, count, width = patches.shape
            side = int(count**0.5)
            planes = patches.reshape(images, side, side, width).permute(0, 3, 1, 2)
            patches = self.conv(planes).flatten(2).transpose(1, 2)
        adapted = self.linear_proj(patches)
        boi = self.boi.to(adapted).expand(adapted.shape[0], -1, -1)
        eoi = self.eoi.to(adapted).expand(adapted.shape[0], -1, -1)
        return torch.cat((boi, adapted, eoi), dim=1)

    def _tower_is_trainable(self) -> bool:
        return any(
            parameter.requires_grad
            for part in (self.patch_embedding, self.transformer)
            for parameter in part.parameters()
        )


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2 (DTensor) or DeepSpeed ZeRO-3 (`ds_id`) has spread the module's weights."""
    return any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in module.parameters())


__all__ = ["CogVLMVisionModel", "eager_attention"]
