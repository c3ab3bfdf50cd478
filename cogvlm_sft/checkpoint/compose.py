"""A base model from its parts: a Llama, a vision tower, and a visual expert copied from the Llama.

As the paper starts: every layer's visual expert begins as a copy of the language expert, so that an
image token is at first computed like a word, and text alone gives exactly the Llama's logits. Fresh
parts are drawn so that they can be learned from: the adapter is scaled until its output has the
size of a word embedding, and boi and eoi are drawn at that size. A tied head is written out,
because the released layout (and every engine that reads it) has a head of its own. A Llama with
grouped-query attention gives a CogVLM2, the only kind that has it: with the stride-2 convolution,
fresh, and a bias of zeros on the visual expert's QKV. Tensors are made and written one by one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn import functional

from cogvlm_sft.checkpoint.language_model import LanguageModel, open_language_model
from cogvlm_sft.checkpoint.load import (
    build_processor,
    expected_shapes,
    load_tokenizer,
    make_config,
    save_processor,
    torch_dtype,
)
from cogvlm_sft.checkpoint.positions import POSITION_EMBEDDING
from cogvlm_sft.checkpoint.staging import staged
from cogvlm_sft.checkpoint.vision_tower import TOWER, open_vision_tower
from cogvlm_sft.checkpoint.weights import Planned, write_weights
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.model import CogVLMConfig
from cogvlm_sft.model.attention_cogvlm import inverse_frequencies

RANDOM = "random"
_ADAPTER = f"{TOWER}linear_proj."


def compose(
    language_model: str | Path,
    vision_tower: str | Path,
    out: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    seed: int = 0,
) -> Path:
    """Writes a CogVLM made of a language model and a vision tower.

    Args:
        language_model: Hugging Face folder of a Llama, or a GGUF file.
        vision_tower: folder or file of EVA2-CLIP-E or of a CogVLM, or "random".
        out: new folder, in the released layout with tokenizer and processor.
        config: fields of config.json to set besides, such as `vision_config` (its
            `num_positions` follows from the picture size) and `initializer_range` of fresh parts.
        tokenizer: folder of the tokenizer in place of the language model's own.
        dtype: of the weights on the disk; None takes the language model's.
        seed: of the fresh parts.

    Returns:
        `out`.

    Raises:
        CheckpointError: a part is missing, damaged, or does not fit; `out` holds a checkpoint.
    """
    llama = open_language_model(language_model)
    loaded = llama.tokenizer() if tokenizer is None else load_tokenizer(Path(tokenizer))
    full = make_config(_fields(llama, loaded, config or {}), where="config")
    processor = build_processor(full, loaded)
    makers = _language_makers(llama, full)
    if str(vision_tower) != RANDOM:
        makers |= open_vision_tower(vision_tower, full)
    embedding = makers["model.embed_tokens.weight"]().float()
    scale = embedding.std().item()
    del embedding
    shapes = expected_shapes(full)
    draw = partial(_fresh, std=full.initializer_range, seed=seed)
    pixels = torch.Size(shapes[f"{TOWER}patch_embedding.proj.weight"][1:]).numel()
    for name, shape in shapes.items():
        if name in makers:
            continue
        if name in (f"{TOWER}boi", f"{TOWER}eoi"):
            makers[name] = partial(_fresh, name, shape, std=scale, seed=seed)
        elif name == POSITION_EMBEDDING:
            std = full.initializer_range * pixels**0.5
            makers[name] = partial(_fresh, name, shape, std=std, seed=seed)
        elif name.endswith("rotary_emb.inv_freq"):
            makers[name] = partial(inverse_frequencies, full)
        elif name == f"{_ADAPTER}dense_4h_to_h.weight":
            makers[name] = partial(_scaled_output, shapes, draw, scale, full.intermediate_size)
        else:
            makers[name] = partial(draw, name, shape)
    kept = llama.dtype if dtype is None else torch_dtype(dtype)
    full.dtype = kept
    with staged(out) as folder:
        write_weights(
            folder,
            [Planned(name, shape, kept, makers[name]) for name, shape in shapes.items()],
            label="compose",
        )
        full.architectures = ["CogVLMForCausalLM"]
        full.save_pretrained(folder)
        save_processor(processor, folder)
    return Path(out)


def config_fields(assignments: Iterable[str]) -> dict[str, Any]:
    """Configuration fields from `key=value` and `vision_config.key=value` strings.

    Raises:
        CheckpointError: a string is not of that form.
    """
    fields: dict[str, Any] = {}
    for assignment in assignments:
        dotted, separator, text = assignment.partition("=")
        section, dot, key = dotted.rpartition(".")
        if not separator or not key or (dot and section != "vision_config"):
            raise CheckpointError(
                f"{assignment!r} is not of the form key=value or vision_config.key=value, for "
                "example vision_config.image_size=224"
            )
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise CheckpointError(f"{assignment!r}: the value is not YAML: {error}") from None
        (fields.setdefault(section, {}) if dot else fields)[key] = value
    return fields


def _fields(llama: LanguageModel, tokenizer: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's fields, the tokenizer's special ids, and what the user sets."""
    fields = {**llama.config, **{k: v for k, v in extra.items() if k != "vision_config"}}
    for kind in ("bos", "eos", "pad"):
        fields.setdefault(f"{kind}_token_id", getattr(tokenizer, f"{kind}_token_id"))
    if fields["pad_token_id"] is None:
        # As CogVLMProcessor chooses it.
        unknown = tokenizer.unk_token_id
        fields["pad_token_id"] = fields["eos_token_id"] if unknown is None else unknown
    vision = extra.get("vision_config") or {}
    if not isinstance(vision, Mapping):
        raise CheckpointError(f"config.vision_config is {vision!r}, expected a mapping")
    vision = dict(vision)
    if "num_positions" not in vision and {"image_size", "patch_size"} & vision.keys():
        defaults = CogVLMConfig().vision_config
        size = vision.get("image_size", defaults.image_size)
        patch = vision.get("patch_size", defaults.patch_size)
        if type(size) is int and type(patch) is int and patch > 0:  # others are named below
            vision["num_positions"] = (size // patch) ** 2 + 1
    return {**fields, "vision_config": vision} if vision else fields


def _language_makers(
    llama: LanguageModel, config: CogVLMConfig
) -> dict[str, Callable[[], torch.Tensor]]:
    """Makers of both experts, the norms, the embeddings and the head, by released name."""

    def fused(prefix: str) -> torch.Tensor:
        return torch.cat([llama.read(f"{prefix}{part}_proj.weight") for part in "qkv"])

    makers: dict[str, Callable[[], torch.Tensor]] = {}
    used: set[str] = set()

    def one(ours: str, theirs: str) -> None:
        makers[ours] = partial(llama.read, theirs)
        used.add(theirs)

    one("model.embed_tokens.weight", "model.embed_tokens.weight")
    one("model.norm.weight", "model.norm.weight")
    tied = "lm_head.weight" not in llama.shapes
    one("lm_head.weight", "model.embed_tokens.weight" if tied else "lm_head.weight")
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            one(at + norm, at + norm)
        used |= {f"{at}self_attn.{part}_proj.weight" for part in "qkv"}
        for expert in ("language", "vision"):
            attention = f"{at}self_attn.{expert}_expert_"
            makers[f"{attention}query_key_value.weight"] = partial(fused, f"{at}self_attn.")
            one(f"{attention}dense.weight", f"{at}self_attn.o_proj.weight")
            for part in ("gate_proj", "up_proj", "down_proj"):
                one(f"{at}mlp.{expert}_mlp.{part}.weight", f"{at}mlp.{part}.weight")
    missing = sorted(used - llama.shapes.keys())
    left = sorted(
        name for name in llama.shapes.keys() - used if not name.endswith("rotary_emb.inv_freq")
    )
    if missing or left:
        raise CheckpointError(
            f"the language model is no plain Llama: {len(missing)} tensors missing "
            f"({', '.join(missing[:2]) or 'none'}), {len(left)} unknown "
            f"({', '.join(left[:2]) or 'none'})"
        )
    return makers


def _fresh(name: str, shape: tuple[int, ...], *, std: float, seed: int) -> torch.Tensor:
    """A fresh tensor, by the rules of `CogVLMPreTrainedModel._init_weights`.

    Each has a generator of its own, so that its values depend on no other tensor.
    """
    if len(shape) == 1:
        is_norm = "norm" in name and name.endswith("weight")
        return torch.ones(shape) if is_norm else torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _scaled_output(
    shapes: Mapping[str, tuple[int, ...]],
    draw: Callable[[str, tuple[int, ...]], torch.Tensor],
    scale: float,
    inner: int,
) -> torch.Tensor:
    """The adapter's last matrix, scaled so that its output has the rms of a word embedding.

    The adapter normalises what it gets from the tower, so normal noise stands for any tower.
    """

    def weight(part: str) -> torch.Tensor:
        name = f"{_ADAPTER}{part}.weight"
        return draw(name, shapes[name])

    last = weight("dense_4h_to_h")
    generator = torch.Generator().manual_seed(0)
    hidden = functional.gelu(torch.randn(256, last.shape[0], generator=generator))
    gated = functional.silu(hidden @ weight("gate_proj").T)
    gated = gated * (hidden @ weight("dense_h_to_4h").T)
    rms = (gated @ last.T).pow(2).mean().sqrt().item()
    return last * (scale / rms) if rms else last
