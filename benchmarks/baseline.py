"""The obvious training step, as the released code computes it: what the fast one is measured by.

Runs over the weights of a `CogVLMForCausalLM`, so that both steps share one model. Written from
facts about the released code, none of it copied: expert masks made anew in every layer, boolean
gathers and scatters around every expert, padding computed, a dense additive mask compared on the
host in every layer and attention written out wherever a batch is padded, logits and cross-entropy
at all positions, torch's own linears. The tower is frozen and without autograd in both.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from cogvlm_sft.model import CogVLMForCausalLM


def baseline_loss(model: CogVLMForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy over the supervised tokens of a right-padded batch.

    Args:
        model: its weights are used, its forward pass is not.
        batch: input_ids, attention_mask, token_type_ids and labels (rows, length), pixel_values.
    """
    torch.backends.mkldnn.enabled = False  # our linears are then `nn.Linear`, as the released ones
    try:
        return _loss(model, batch)
    finally:
        torch.backends.mkldnn.enabled = True


def _loss(model: CogVLMForCausalLM, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    backbone: Any = model.model
    types, mask = batch["token_type_ids"], batch["attention_mask"]
    hidden = backbone.embed_tokens(batch["input_ids"])
    features = backbone.vision(batch["pixel_values"])
    hidden = hidden.index_put((types == 1,), features.flatten(0, 1))
    positions = _position_ids(types, mask)
    length = types.shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    hidden_keys = future | ~mask.bool()[:, None, None, :]
    additive = torch.zeros(hidden_keys.shape).masked_fill(
        hidden_keys, torch.finfo(hidden.dtype).min
    )
    for layer in backbone.layers:
        hidden = _layer(layer, hidden, types, positions, additive)
    logits = model.lm_head(_norm(backbone.norm, hidden)).float()
    shifted = logits[:, :-1].contiguous().view(-1, logits.shape[-1])
    return functional.cross_entropy(shifted, batch["labels"][:, 1:].contiguous().view(-1))


def _experts(types: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    vision = torch.zeros_like(types, dtype=torch.bool)
    vision[:, :-1] = (types[:, :-1] == 1) & (types[:, 1:] == 1)
    return vision, ~vision


def _position_ids(types: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    kinds = types.clone()
    inside = (types[:, 1:-1] == 1) & (types[:, :-2] == 1) & (types[:, 2:] == 1)
    kinds[:, 1:-1][~inside] = 0
    kinds[:, 0] = kinds[:, -1] = 0
    repeats = torch.zeros_like(types, dtype=torch.bool)
    repeats[:, 1:] = (kinds[:, 1:] == 1) & (kinds[:, :-1] == 1)
    counts = ~(repeats | ~mask.bool())
    counts[:, 0] = False
    return counts.long().cumsum(1)


def _norm(norm: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    wide = hidden.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    return (norm.weight * (wide * scale)).to(hidden.dtype)


def _both(vision_expert: nn.Module, language_expert: nn.Module, hidden: torch.Tensor,
          types: torch.Tensor, width: int) -> torch.Tensor:  # fmt: skip
    vision, language = _experts(types)
    out = torch.empty(*hidden.shape[:-1], width, dtype=hidden.dtype)
    out[vision] = vision_expert(hidden[vision])
    out[language] = language_expert(hidden[language])
    return out


def _rotate(states: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    half = states.shape[-1] // 2
    turned = torch.cat((-states[..., half:], states[..., :half]), -1)
    return states * cosine + turned * sine


def _layer(layer: Any, hidden: torch.Tensor, types: torch.Tensor, positions: torch.Tensor,
           additive: torch.Tensor) -> torch.Tensor:  # fmt: skip
    attention = layer.self_attn
    batch, length, width = hidden.shape
    size = attention.head_dim
    normed = _norm(layer.input_layernorm, hidden)
    fused = _both(attention.vision_expert_query_key_value,
                  attention.language_expert_query_key_value, normed, types, 3 * width)  # fmt: skip
    query, key, value = (
        part.view(batch, length, -1, size).transpose(1, 2) for part in fused.split(width, -1)
    )
    count = int(positions.max()) + 1  # the released code syncs here, in every layer
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    angles = torch.outer(torch.arange(count), 1.0 / attention.config.rope_base**exponents)
    angles = torch.cat((angles, angles), -1)
    cosine, sine = (table[positions][:, None] for table in (angles.cos(), angles.sin()))
    query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
    visible = additive == 0
    if bool((visible == torch.ones_like(visible, dtype=torch.float32).tril()).all()):
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    else:
        scores = query / size**0.5 @ key.transpose(2, 3) + additive
        out = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    out = out.transpose(1, 2).reshape(batch, length, width)
    hidden = hidden + _both(attention.vision_expert_dense, attention.language_expert_dense, out,
                            types, width)  # fmt: skip
    normed = _norm(layer.post_attention_layernorm, hidden)
    return hidden + _both(layer.mlp.vision_mlp, layer.mlp.language_mlp, normed, types, width)
