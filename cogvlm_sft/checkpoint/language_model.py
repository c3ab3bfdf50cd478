"""A Llama-shaped language model on the disk, as a source of CogVLM's language weights.

Two forms are read: a Hugging Face folder (Vicuna, Llama, SmolLM2: any model of type `llama` with
plain RoPE and no biases), and a GGUF file of architecture `llama`, whose blocks are unpacked to
fp32 one tensor at a time. GGUF interleaves the halves of rotary heads in Q and K; that is undone
here. Tensors go by their Hugging Face names in both. What CogVLM's layers cannot hold (biases, a
head size of its own, scaled RoPE) is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cogvlm_sft.checkpoint.load import load_tokenizer, weight_files
from cogvlm_sft.checkpoint.weights import Header, dtype_of, read_headers, read_tensor
from cogvlm_sft.errors import CheckpointError

_ROPE_DEFAULT = 10000.0  # of Llama configurations that name none

# Hugging Face name of a Llama's tensor -> its name in a GGUF file (llama.cpp's table).
_GGUF_ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A language model that a CogVLM can be built on.

    Attributes:
        config: fields of a CogVLMConfig that it decides.
        shapes: of its tensors, by Hugging Face name (`lm_head.weight` is absent where it is tied).
        dtype: dtype of its matrices (float32 for GGUF).
        read: makes one tensor, by name.
        tokenizer: loads its tokenizer.
    """

    config: dict[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    read: Callable[[str], torch.Tensor]
    tokenizer: Callable[[], PreTrainedTokenizerBase]


def open_language_model(path: str | Path) -> LanguageModel:
    """Opens a language model; headers only are read.

    Args:
        path: Hugging Face folder, or a `.gguf` file.

    Raises:
        CheckpointError: it is missing or damaged, or no Llama that CogVLM's layers can hold.
    """
    place = Path(path)
    if place.suffix == ".gguf":
        if not place.is_file():
            raise CheckpointError(f"language model {place} does not exist; expected a GGUF file")
        return _open_gguf(place)
    return _open_folder(place)


def _open_folder(folder: Path) -> LanguageModel:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(
            f"language model {folder} holds no config.json; expected a Hugging Face folder of a "
            "Llama (such as lmsys/vicuna-7b-v1.5), or a .gguf file"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: cannot be read as JSON: {error}") from None
    config = _config(raw, file)
    headers = read_headers(weight_files(folder))
    if raw.get("tie_word_embeddings"):
        headers.pop("lm_head.weight", None)
    return LanguageModel(
        config=config,
        shapes={name: header.shape for name, header in headers.items()},
        dtype=_matrix_dtype(headers),
        read=lambda name: read_tensor(name, headers[name]),
        tokenizer=partial(load_tokenizer, folder),
    )


def _matrix_dtype(headers: Mapping[str, Header]) -> torch.dtype:
    embedding = headers.get("model.embed_tokens.weight")
    return torch.float32 if embedding is None else dtype_of(embedding)


def _config(raw: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """CogVLM's fields from a Llama's config.json.

    Raises:
        CheckpointError: naming the key that CogVLM cannot follow.
    """

    def refuse(key: str, found: object, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{file}: {key} is {found!r}; a CogVLM's language model has {expected}"
        )

    if not isinstance(raw, dict) or raw.get("model_type") != "llama":
        kind = raw.get("model_type") if isinstance(raw, dict) else None
        raise refuse("model_type", kind, "'llama'")
    missing = [
        key
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                    "num_attention_heads")
        if type(raw.get(key)) is not int or raw[key] < 1
    ]  # fmt: skip
    if missing:
        raise CheckpointError(
            f"{file}: {', '.join(missing)} is missing or below 1; expected whole numbers"
        )
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise refuse(key, True, "no biases")
    size = raw["hidden_size"] // raw["num_attention_heads"]
    if raw.get("head_dim") not in (None, size):
        raise refuse("head_dim", raw["head_dim"], f"hidden_size / num_attention_heads = {size}")
    # transformers 5 writes rope_parameters, older versions rope_theta and rope_scaling.
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise refuse("rope_parameters", rope, "an object there, or none")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise refuse("rope_scaling", kind, "plain RoPE")
    theta = rope.get("rope_theta", raw.get("rope_theta", _ROPE_DEFAULT))
    if not isinstance(theta, int | float):
        raise refuse("rope_theta", theta, "a number there")
    kept = {
        key: raw[key]
        for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                    "num_attention_heads", "hidden_act", "max_position_embeddings",
                    "initializer_range", "rms_norm_eps")
        if key in raw
    }  # fmt: skip
    return {**kept, **_generation(raw.get("num_key_value_heads"), raw, float(theta))}


def _generation(
    key_value_heads: int | None, raw: Mapping[str, Any], theta: float
) -> dict[str, Any]:
    """Grouped-query attention makes a CogVLM2, the only released kind that has it."""
    grouped = key_value_heads not in (None, raw["num_attention_heads"])
    fields: dict[str, Any] = {"num_multi_query_heads": key_value_heads} if grouped else {}
    if theta != (500000.0 if grouped else _ROPE_DEFAULT):
        fields["rope_theta"] = theta
    return fields


def _open_gguf(file: Path) -> LanguageModel:
    try:
        from gguf import GGUFReader, dequantize
    except ImportError:
        raise CheckpointError(
            f"{file}: GGUF files are read by the package gguf, which is not installed; "
            "pip install 'cogvlm-sft[gguf]'"
        ) from None
    try:
        reader = GGUFReader(file)
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise CheckpointError(f"{file}: cannot be read as GGUF: {error}") from None

    def value(key: str, default: Any = None) -> Any:
        field = reader.fields.get(key)
        return default if field is None else field.contents()

    architecture = value("general.architecture")
    if architecture != "llama":
        raise CheckpointError(
            f"{file}: general.architecture is {architecture!r}; a CogVLM's language model is a "
            "'llama'"
        )
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise CheckpointError(f"{file}: holds no token_embd.weight, so no whole language model")
    raw = {
        "model_type": "llama",
        "vocab_size": int(tensors["token_embd.weight"].shape[-1]),
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "max_position_embeddings": value("llama.context_length"),
        # Written as fp32; the shortest decimal that rounds to it is what config.json said.
        "rms_norm_eps": _shortest(value("llama.attention.layer_norm_rms_epsilon", 1e-5)),
        "head_dim": value("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "rope_theta": _shortest(value("llama.rope.freq_base", _ROPE_DEFAULT)),
        "rope_scaling": {"rope_type": value("llama.rope.scaling.type", "default")},
    }
    if raw["rope_scaling"]["rope_type"] == "none":
        raw["rope_scaling"] = None
    if "rope_freqs.weight" in tensors:
        raw["rope_scaling"] = {"rope_type": "llama3"}
    config = _config(raw, file)
    layers = range(raw["num_hidden_layers"])
    names = {
        f"model.layers.{layer}.{ours}.weight": f"blk.{layer}.{theirs}.weight"
        for layer in layers
        for ours, theirs in _GGUF_LAYER.items()
    }
    names |= _GGUF_ENDS
    heads = {
        "q_proj": raw["num_attention_heads"],
        "k_proj": raw["num_key_value_heads"] or raw["num_attention_heads"],
    }

    def read(name: str) -> torch.Tensor:
        entry = tensors[names[name]]
        tensor = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
        count = heads.get(name.rsplit(".", 2)[-2])
        return tensor if count is None else _halves_apart(tensor, count)

    def tokenizer() -> PreTrainedTokenizerBase:
        try:
            loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # transformers raises anything on a file it cannot convert
            raise CheckpointError(f"{file}: its tokenizer cannot be loaded: {error}") from None
        return loaded

    return LanguageModel(
        config=config,
        shapes={
            ours: tuple(int(size) for size in reversed(tensors[theirs].shape))
            for ours, theirs in names.items()
            if theirs in tensors
        },
        dtype=torch.float32,
        read=read,
        tokenizer=tokenizer,
    )


def _halves_apart(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undoes llama.cpp's interleaving of the two rotary halves of each head."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])
    return pairs.transpose(1, 2).reshape(weight.shape)


def _shortest(value: float) -> float:
    """The decimal that a 32-bit float was written for."""
    return float(f"{value:.7g}")
