"""Weights for the vision tower: EVA2-CLIP-E by the names it goes by, another CogVLM's, or fresh.

EVA2-CLIP-E is published as `eva02_enormous_patch14` (timm, open_clip: 64 layers) and with Hugging
Face CLIP names. CogVLM's tower is that model without its last layer, final norm and head. Keys have
no bias there and one of zeros here. Layers keep their post-norm; nothing in the names tells a
pre-norm CLIP apart, so the widths are checked and no more than that can be.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from cogvlm_sft.checkpoint.load import weight_files
from cogvlm_sft.checkpoint.positions import POSITION_EMBEDDING, interpolate_positions
from cogvlm_sft.checkpoint.weights import read_headers, read_tensor
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.model import CogVLMConfig

TOWER = "model.vision."
_PATCHES = f"{TOWER}patch_embedding."
_LAYER = re.compile(r"model\.vision\.transformer\.layers\.(\d+)\.(.+)")
Make = Callable[[], torch.Tensor]
Read = Callable[[str], torch.Tensor]

# What a published tower calls a tensor of ours. `{n}` is the layer.
_TIMM = {
    "patch_embedding.proj.weight": "patch_embed.proj.weight",
    "patch_embedding.proj.bias": "patch_embed.proj.bias",
    "patch_embedding.cls_embedding": "cls_token",
    "patch_embedding.position_embedding.weight": "pos_embed",
    "attention.query_key_value.weight": "blocks.{n}.attn.qkv.weight",
    "attention.dense.weight": "blocks.{n}.attn.proj.weight",
    "attention.dense.bias": "blocks.{n}.attn.proj.bias",
    "mlp.fc1.weight": "blocks.{n}.mlp.fc1.weight",
    "mlp.fc1.bias": "blocks.{n}.mlp.fc1.bias",
    "mlp.fc2.weight": "blocks.{n}.mlp.fc2.weight",
    "mlp.fc2.bias": "blocks.{n}.mlp.fc2.bias",
    "input_layernorm.weight": "blocks.{n}.norm1.weight",
    "input_layernorm.bias": "blocks.{n}.norm1.bias",
    "post_attention_layernorm.weight": "blocks.{n}.norm2.weight",
    "post_attention_layernorm.bias": "blocks.{n}.norm2.bias",
}
_HF = {
    "patch_embedding.proj.weight": "embeddings.patch_embedding.weight",
    "patch_embedding.proj.bias": "embeddings.patch_embedding.bias",
    "patch_embedding.cls_embedding": "embeddings.class_embedding",
    "patch_embedding.position_embedding.weight": "embeddings.position_embedding",
    "attention.dense.weight": "encoder.layers.{n}.self_attn.out_proj.weight",
    "attention.dense.bias": "encoder.layers.{n}.self_attn.out_proj.bias",
    "mlp.fc1.weight": "encoder.layers.{n}.mlp.fc1.weight",
    "mlp.fc1.bias": "encoder.layers.{n}.mlp.fc1.bias",
    "mlp.fc2.weight": "encoder.layers.{n}.mlp.fc2.weight",
    "mlp.fc2.bias": "encoder.layers.{n}.mlp.fc2.bias",
    "input_layernorm.weight": "encoder.layers.{n}.layer_norm1.weight",
    "input_layernorm.bias": "encoder.layers.{n}.layer_norm1.bias",
    "post_attention_layernorm.weight": "encoder.layers.{n}.layer_norm2.weight",
    "post_attention_layernorm.bias": "encoder.layers.{n}.layer_norm2.bias",
}
# Where the tower stands in a file of the whole CLIP (a timm tower inside open_clip is a trunk).
_PREFIXES = ("", "visual.trunk.", "visual.", "vision_model.", "model.visual.")


def open_vision_tower(path: str | Path, config: CogVLMConfig) -> dict[str, Make]:
    """Makers of every tower tensor that `config` asks for, by released name.

    Args:
        path: folder or file (`.safetensors`, or `.pt`/`.bin` read with `weights_only`).
        config: decides depth, widths and picture size; positions are interpolated to it.

    Raises:
        CheckpointError: nothing at `path`, names of no known kind, or sizes that do not fit.
    """
    place = Path(path)
    shapes, read = _open(place)
    if _PATCHES + "proj.weight" in shapes:
        source: dict[str, Make] = {
            name: partial(read, name) for name in shapes if name.startswith(TOWER)
        }
        depth = 1 + max(int(m[1]) for m in map(_LAYER.fullmatch, source) if m)
    else:
        source, depth = _published(place, shapes, read)
    vision = config.vision_config
    if depth < vision.num_hidden_layers:
        raise CheckpointError(
            f"{place}: a tower of {depth} layers to take; vision_config.num_hidden_layers is "
            f"{vision.num_hidden_layers}"
        )
    positions = source[POSITION_EMBEDDING]
    source[POSITION_EMBEDDING] = lambda: interpolate_positions(positions(), vision.grid)
    return source


def _open(place: Path) -> tuple[Mapping[str, tuple[int, ...]], Read]:
    if place.is_dir():
        headers = read_headers(weight_files(place))
    elif place.suffix == ".safetensors" and place.is_file():
        headers = read_headers([place])
    elif place.is_file():
        try:
            state = torch.load(place, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError:
            raise CheckpointError(
                f"{place} holds more than tensors, which could run code when read; save its state "
                "dict alone, or as safetensors"
            ) from None
        except (RuntimeError, OSError, ValueError, EOFError, KeyError) as error:
            raise CheckpointError(f"{place}: cannot be read as torch weights: {error}") from None
        if not isinstance(state, dict):
            raise CheckpointError(f"{place}: holds a {type(state).__name__}, expected a state dict")
        for key in ("state_dict", "module", "model"):
            if isinstance(state.get(key), dict):
                state = state[key]
        tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
        return {k: tuple(v.shape) for k, v in tensors.items()}, lambda name: tensors[name].clone()
    else:
        raise CheckpointError(
            f"vision tower {place} does not exist; expected a folder or file of weights, or the "
            "word random"
        )
    return (
        {name: header.shape for name, header in headers.items()},
        lambda name: read_tensor(name, headers[name]),
    )


def _published(
    place: Path, shapes: Mapping[str, tuple[int, ...]], read: Read
) -> tuple[dict[str, Make], int]:
    """Makers by our names, and the number of layers to take: all but the last."""
    for table in (_TIMM, _HF):
        for prefix in _PREFIXES:
            if prefix + table["patch_embedding.proj.weight"] in shapes:
                return _translate(place, shapes, read, table, prefix)
    raise CheckpointError(
        f"{place}: no vision tower by its names ({', '.join(list(shapes)[:3])}, …); expected "
        "EVA2-CLIP-E as timm, open_clip or Hugging Face write it, or a CogVLM"
    )


def _translate(
    place: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Read,
    table: Mapping[str, str],
    prefix: str,
) -> tuple[dict[str, Make], int]:
    layers = {
        int(match[1])
        for match in (
            re.match(re.escape(prefix) + r"(?:blocks|encoder\.layers)\.(\d+)\.", name)
            for name in shapes
        )
        if match
    }
    depth = max(layers, default=0)  # numbers start at 0: all but the last
    makers: dict[str, Make] = {}

    def need(name: str, ours: str) -> None:
        if name not in shapes:
            raise CheckpointError(f"{place}: {name} is missing, which {ours} is read from")

    def take(ours: str, theirs: str) -> None:
        name = prefix + theirs
        if name not in shapes and name + ".weight" in shapes:
            name += ".weight"  # an Embedding's table
        need(name, ours)
        makers[ours] = lambda: _flat(ours, read(name))

    for ours, theirs in table.items():
        if ours.startswith("patch_embedding."):
            take(TOWER + ours, theirs)
            continue
        for n in range(depth):
            take(f"{TOWER}transformer.layers.{n}.{ours}", theirs.format(n=n))
    for n in range(depth):
        ours = f"{TOWER}transformer.layers.{n}.attention.query_key_value."
        block = f"{prefix}blocks.{n}.attn."
        if table is _TIMM and f"{block}qkv.bias" in shapes:
            take(f"{ours}bias", f"blocks.{n}.attn.qkv.bias")
        elif table is _TIMM:
            need(f"{block}q_bias", f"{ours}bias")
            need(f"{block}v_bias", f"{ours}bias")
            makers[f"{ours}bias"] = _bias_maker(
                shapes, read, [f"{block}q_bias", None, f"{block}v_bias"]
            )
        else:
            parts = [f"{prefix}encoder.layers.{n}.self_attn.{part}_proj." for part in "qkv"]
            for part in parts:
                need(f"{part}weight", f"{ours}weight")
            makers[f"{ours}weight"] = _cat_maker(read, [f"{part}weight" for part in parts])
            biases = [f"{p}bias" if f"{p}bias" in shapes else None for p in parts]
            makers[f"{ours}bias"] = _bias_maker(
                shapes, read, biases, width=shapes[f"{parts[0]}weight"][0]
            )
    return makers, depth


def _cat_maker(read: Read, names: list[str]) -> Make:
    return lambda: torch.cat([read(name) for name in names])


def _bias_maker(
    shapes: Mapping[str, tuple[int, ...]],
    read: Read,
    names: list[str | None],
    width: int | None = None,
) -> Make:
    """The fused bias of Q, K and V; a part without one gets zeros."""
    size = width or next(shapes[name][0] for name in names if name)

    def make() -> torch.Tensor:
        return torch.cat([torch.zeros(size) if n is None else read(n).float() for n in names])

    return make


def _flat(ours: str, tensor: torch.Tensor) -> torch.Tensor:
    """Class token and positions lose the leading axes that published files carry."""
    if ours.endswith("cls_embedding"):
        return tensor.reshape(1, -1)
    if ours == POSITION_EMBEDDING:
        return tensor.reshape(-1, tensor.shape[-1])
    return tensor
