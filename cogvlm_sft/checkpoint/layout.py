"""The released layout by formula: every tensor of a configuration, its shape and its group.

Facts of the released index, written out so that a checkpoint can be inspected without torch; a test
holds them equal to the model's own parameters and to `tune.group_of`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """A tensor that a checkpoint must hold."""

    name: str
    shape: tuple[int, ...]
    group: str


def with_released_default(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the key/value heads that the released CogVLM2's leaves to Python code.

    The same rules as `CogVLMConfig` has: others call them `num_key_value_heads`.
    """
    if config.get("num_multi_query_heads") is not None:
        return config
    shared = config.get("num_key_value_heads")
    if shared is None and config.get("vocab_size") == 128256:
        shared = 8
    if shared in (None, config.get("num_attention_heads")):
        return config
    return {**config, "num_multi_query_heads": shared}


def entries(config: Mapping[str, Any]) -> Iterator[Entry]:
    """Every parameter that a config.json asks for, in no particular order.

    Args:
        config: the file's contents, with its `vision_config`.

    Raises:
        KeyError: a size is missing.
    """
    width, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    grouped = config.get("num_multi_query_heads")
    fused = width + 2 * (grouped or heads) * (width // heads)
    vision = config["vision_config"]
    side, patch = vision["hidden_size"], vision["patch_size"]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        yield Entry(name, (config["vocab_size"], width), "embeddings")
    yield Entry("model.norm.weight", (width,), "language")
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield Entry(f"{at}{norm}.weight", (width,), "language")
        for expert, group in (("language", "language"), ("vision", "visual_expert")):
            attention = f"{at}self_attn.{expert}_expert_"
            yield Entry(f"{attention}query_key_value.weight", (fused, width), group)
            if grouped and expert == "vision":
                yield Entry(f"{attention}query_key_value.bias", (fused,), group)
            yield Entry(f"{attention}dense.weight", (width, width), group)
            mlp = f"{at}mlp.{expert}_mlp."
            yield Entry(f"{mlp}gate_proj.weight", (inner, width), group)
            yield Entry(f"{mlp}up_proj.weight", (inner, width), group)
            yield Entry(f"{mlp}down_proj.weight", (width, inner), group)
    at = "model.vision."
    for name in ("boi", "eoi"):
        yield Entry(at + name, (1, 1, width), "adapter")
    if grouped:
        yield Entry(f"{at}conv.weight", (side, side, 2, 2), "adapter")
        yield Entry(f"{at}conv.bias", (side,), "adapter")
    glu = f"{at}linear_proj."
    yield Entry(f"{glu}linear_proj.weight", (width, side), "adapter")
    for kind in ("weight", "bias"):
        yield Entry(f"{glu}norm1.{kind}", (width,), "adapter")
    for part in ("dense_h_to_4h", "gate_proj"):
        yield Entry(f"{glu}{part}.weight", (inner, width), "adapter")
    yield Entry(f"{glu}dense_4h_to_h.weight", (width, inner), "adapter")
    patches = f"{at}patch_embedding."
    channels = vision.get("in_channels", 3)
    for name, shape in (
        ("cls_embedding", (1, side)),
        ("position_embedding.weight", (vision["num_positions"], side)),
        ("proj.weight", (side, channels, patch, patch)),
        ("proj.bias", (side,)),
    ):
        yield Entry(patches + name, shape, "vision_tower")
    wide = vision["intermediate_size"]
    for layer in range(vision["num_hidden_layers"]):
        at = f"model.vision.transformer.layers.{layer}."
        for module, (rows, columns) in (
            ("attention.query_key_value", (3 * side, side)),
            ("attention.dense", (side, side)),
            ("mlp.fc1", (wide, side)),
            ("mlp.fc2", (side, wide)),
        ):
            yield Entry(f"{at}{module}.weight", (rows, columns), "vision_tower")
            yield Entry(f"{at}{module}.bias", (rows,), "vision_tower")
        for norm in ("input_layernorm", "post_attention_layernorm"):
            for kind in ("weight", "bias"):
                yield Entry(f"{at}{norm}.{kind}", (side,), "vision_tower")
