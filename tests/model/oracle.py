"""CogVLM written out slowly: the tests' oracle, and what the fast path is measured against.

Pure functions over a state dict with the released names. Every token goes through both experts and
a mask picks the one that counts; attention is a dense softmax; nothing is routed, trimmed or
cached. It shares no code with `cogvlm_sft.model` but the configuration.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

Weights = dict[str, torch.Tensor]


def _linear(weights: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _layer_norm(weights: Weights, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def _attention(query, key, value, visible):
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if visible is not None:
        scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ value


def image_features(weights: Weights, config, pixel_values: torch.Tensor) -> torch.Tensor:
    """(images, 3, side, side) to (images, image tokens, hidden)."""
    vision = config.vision_config
    name = "model.vision.patch_embedding"
    patches = F.conv2d(
        pixel_values,
        weights[f"{name}.proj.weight"],
        weights[f"{name}.proj.bias"],
        stride=vision.patch_size,
    )
    count = patches.shape[0]
    x = patches.reshape(count, vision.hidden_size, -1).permute(0, 2, 1)
    x = torch.cat((weights[f"{name}.cls_embedding"].expand(count, 1, -1), x), 1)
    x = x + weights[f"{name}.position_embedding.weight"]
    for index in range(vision.num_hidden_layers):
        name = f"model.vision.transformer.layers.{index}"
        fused = _linear(weights, f"{name}.attention.query_key_value", x)
        query, key, value = (
            part.reshape(count, x.shape[1], vision.num_heads, -1).transpose(1, 2)
            for part in fused.chunk(3, -1)
        )
        mixed = _attention(query, key, value, None).transpose(1, 2).flatten(2)
        mixed = _linear(weights, f"{name}.attention.dense", mixed)
        x = x + _layer_norm(weights, f"{name}.input_layernorm", mixed, vision.layer_norm_eps)
        inner = _linear(weights, f"{name}.mlp.fc2", F.gelu(_linear(weights, f"{name}.mlp.fc1", x)))
        x = x + _layer_norm(
            weights, f"{name}.post_attention_layernorm", inner, vision.layer_norm_eps
        )
    x = x[:, 1:]
    if config.is_cogvlm2:
        side = vision.image_size // vision.patch_size
        x = x.transpose(1, 2).reshape(count, vision.hidden_size, side, side)
        x = F.conv2d(
            x, weights["model.vision.conv.weight"], weights["model.vision.conv.bias"], stride=2
        )
        x = x.flatten(2).transpose(1, 2)
    name = "model.vision.linear_proj"
    x = _linear(weights, f"{name}.linear_proj", x)
    x = F.gelu(_layer_norm(weights, f"{name}.norm1", x, 1e-5))
    x = F.silu(_linear(weights, f"{name}.gate_proj", x)) * _linear(
        weights, f"{name}.dense_h_to_4h", x
    )
    x = _linear(weights, f"{name}.dense_4h_to_h", x)
    edge = [weights[f"model.vision.{end}"].expand(count, 1, -1) for end in ("boi", "eoi")]
    return torch.cat((edge[0], x, edge[1]), 1)


def token_facts(token_type_ids, attention_mask):
    """Expert (True: vision) and position of every token, one token after the other."""
    expert, position = torch.zeros_like(token_type_ids, dtype=torch.bool), []
    for row, types in enumerate(token_type_ids.tolist()):
        ids, current = [], 0
        for column, kind in enumerate(types):
            last = column + 1 == len(types)
            following = 0 if last else types[column + 1]
            expert[row, column] = kind == 1 and following == 1
            before = types[column - 1] if column else 0
            patch = kind == 1 and before == 1 and following == 1
            later_patch = patch and column >= 2 and types[column - 2] == 1
            real = attention_mask is None or bool(attention_mask[row, column])
            if column and real and not later_patch:
                current += 1
            ids.append(current)
        position.append(ids)
    return expert, torch.tensor(position)


def logits(
    weights: Weights, config, input_ids, token_type_ids, attention_mask=None, pixel_values=None
) -> torch.Tensor:
    """(batch, length, vocabulary) in fp32."""
    batch, length = input_ids.shape
    heads, groups = config.num_attention_heads, getattr(config, "num_multi_query_heads", None)
    size = config.hidden_size // heads
    key_heads = groups or heads
    base = config.rope_theta or (500000.0 if groups is not None else 10000.0)
    expert, position = token_facts(token_type_ids, attention_mask)
    x = weights["model.embed_tokens.weight"][input_ids]
    if pixel_values is not None:
        x = x.clone()
        x[token_type_ids == 1] = image_features(weights, config, pixel_values).flatten(0, 1)
    angles = position[..., None] * base ** -(torch.arange(0, size, 2) / size)
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotate(states):
        pairs = torch.complex(*states.float().chunk(2, -1)) * turn
        return torch.cat((pairs.real, pairs.imag), -1)

    def norm(name, states):
        scale = (states.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).rsqrt()
        return weights[f"{name}.weight"] * (states * scale)

    def both(name, kind, states):
        return torch.where(
            expert[..., None],
            _linear(weights, name.format("vision") + kind, states),
            _linear(weights, name.format("language") + kind, states),
        )

    visible = torch.ones(length, length, dtype=torch.bool).tril()
    if attention_mask is not None:
        visible = visible & attention_mask.bool()[:, None, None, :]
    for index in range(config.num_hidden_layers):
        name = f"model.layers.{index}"
        fused = both(
            f"{name}.self_attn.{{}}_expert", "_query_key_value", norm(f"{name}.input_layernorm", x)
        )
        query, key, value = (
            part.reshape(batch, length, -1, size).transpose(1, 2)
            for part in fused.split((heads * size, key_heads * size, key_heads * size), -1)
        )
        query, key = rotate(query), rotate(key)
        key, value = (t.repeat_interleave(heads // key_heads, 1) for t in (key, value))
        mixed = _attention(query, key, value, visible).transpose(1, 2).flatten(2)
        x = x + both(f"{name}.self_attn.{{}}_expert", "_dense", mixed)
        inner = norm(f"{name}.post_attention_layernorm", x)
        mlp = f"{name}.mlp.{{}}_mlp"
        inner = F.silu(both(mlp, ".gate_proj", inner)) * both(mlp, ".up_proj", inner)
        x = x + both(mlp, ".down_proj", inner)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return F.linear(norm("model.norm", x), head).float()
