"""Checkpoint folders in, checkpoint folders out, and nothing in between left to chance.

Loading looks at the folder first (configuration, every weight file, the name and shape of every
tensor by the safetensors headers), so that a wrong folder is one clear message and not a model with
fresh weights in it. Saving writes beside the target and renames, so a reader never meets half a
checkpoint. Only safetensors is read: the older `.bin` files are pickles, which can run code.
"""

import contextlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from cogvlm_sft import launch
from cogvlm_sft.checkpoint.adapter import (
    base_of,
    is_adapter,
    trained_image_size,
    wear_adapter,
)
from cogvlm_sft.checkpoint.config import load_config, make_config
from cogvlm_sft.checkpoint.fill import StoredWeights, fill
from cogvlm_sft.checkpoint.positions import resize_positions, with_image_size
from cogvlm_sft.checkpoint.processor import (
    build_processor,
    load_processor,
    load_tokenizer,
    save_processor,
)
from cogvlm_sft.checkpoint.quantized import nf4_config, settle_quantized
from cogvlm_sft.checkpoint.sharded import is_sharded, load_sharded_weights
from cogvlm_sft.checkpoint.staging import staged
from cogvlm_sft.checkpoint.weight_index import WEIGHT_DTYPES, shard_names
from cogvlm_sft.checkpoint.weights import (
    INDEX,
    Header,
    check_fit,
    first_few,
    read_headers,
)
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.model import (
    CogVLMConfig,
    CogVLMForCausalLM,
    CogVLMProcessor,
)

# Buffers that released files hold and newer exports may leave out; they are computed, never read.
OPTIONAL_SUFFIX = "rotary_emb.inv_freq"
_SHARD_SIZE = "5GB"  # as the released repositories are cut


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    attention: str = "sdpa",
    quantize: Collection[str] = (),
    base: str | Path | None = None,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
) -> CogVLMForCausalLM:
    """Load a CogVLM from a folder in the released layout, every tensor accounted for.

    Tensors are read one after another and put where they stay: above the model itself, no more
    than one of them is in memory.

    An adapter's folder loads its base and merges the adapter into it; with `quantize` the adapter
    stays beside the 4-bit weights, as it was trained.

    Args:
        path: folder with config.json and safetensors weights, or with an adapter; or a snapshot in
            FSDP's shards.
        dtype: "float32", "bfloat16" or a torch dtype that the weights are held in.
        attention: one of transformers' attention implementations, such as "sdpa".
        quantize: parameter groups whose linears are held in NF4 (`checkpoint.quantized`).
        base: of an adapter, in place of the folder that its configuration names.
        image_size: side of the pictures in pixels, where it is to differ from the checkpoint's;
            the tower's position embedding is interpolated (`checkpoint.positions`).
        device: where the weights are put; "meta" reads none (`checkpoint.fill` does, once the model
            is split). 4-bit ones are made on this process's own device.

    Raises:
        CheckpointError: the folder, its configuration or its weights are missing, damaged, or do
            not fit a CogVLM; tensors that are missing, unexpected or misshapen are named.
    """
    folder = Path(path)
    if is_adapter(folder):
        root = base_of(folder, base)
        model = load_model(
            root,
            dtype=dtype,
            attention=attention,
            quantize=quantize,
            image_size=trained_image_size(folder),
            device=device,
        )
        model = wear_adapter(model, folder, merge=not quantize)
        if image_size is not None:
            resize_positions(model, image_size)
        return model
    if is_sharded(folder) and not quantize:
        model = _load_sharded(folder, torch_dtype(dtype), attention, device)
        if image_size is not None:
            resize_positions(model, image_size)
        return model
    if not quantize:
        stored = stored_weights(folder, image_size)
        return _load_plain(folder, stored, torch_dtype(dtype), attention, device)
    config = load_config(folder)
    _check_tensors(folder, config)
    model = _load_quantized(folder, config, torch_dtype(dtype), attention, quantize)
    if image_size is not None:
        resize_positions(model, image_size)
    return model


def _load_plain(
    folder: Path,
    stored: StoredWeights,
    dtype: torch.dtype,
    attention: str,
    device: str | torch.device,
) -> CogVLMForCausalLM:
    """Builds a model without storage and fills it, or leaves both for when it is split."""
    # DeepSpeed splits a model as it is built; it cannot split what has no storage.
    place = contextlib.nullcontext() if is_deepspeed_zero3_enabled() else torch.device("meta")
    try:
        with place:
            model: CogVLMForCausalLM = CogVLMForCausalLM._from_config(
                stored.config, dtype=dtype, attn_implementation=attention
            )
    except (ImportError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {error}") from None
    if torch.device(device).type != "meta":
        if model.device.type == "meta":
            model.to_empty(device=device)
        fill(model, stored)
    file = folder / "generation_config.json"
    if file.is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(
                folder, local_files_only=True
            )
        except (OSError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}") from None
    return model.eval()


def _load_sharded(
    folder: Path, dtype: torch.dtype, attention: str, device: str | torch.device
) -> CogVLMForCausalLM:
    """A snapshot that FSDP wrote."""
    with torch.device("meta"):
        model: CogVLMForCausalLM = CogVLMForCausalLM._from_config(
            load_config(folder), dtype=dtype, attn_implementation=attention
        )
    model.to_empty(device=device)
    load_sharded_weights(model, folder)
    return model.eval()


def stored_weights(path: str | Path, image_size: int | None = None) -> StoredWeights:
    """The tensors of a checkpoint folder, none of them read yet, every one accounted for.

    Args:
        path: folder with config.json and safetensors weights.
        image_size: side of the pictures in pixels, where it is to differ from the checkpoint's.

    Raises:
        CheckpointError: see `load_model`.
    """
    config = load_config(Path(path))
    headers = _check_tensors(Path(path), config)
    if image_size is not None:
        config = with_image_size(config, image_size)
    return StoredWeights(config, headers)


def _load_quantized(
    folder: Path,
    config: CogVLMConfig,
    dtype: torch.dtype,
    attention: str,
    quantize: Collection[str],
) -> CogVLMForCausalLM:
    """By transformers, whose bitsandbytes integration makes 4-bit weights as it reads."""
    try:
        model, info = CogVLMForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            quantization_config=nf4_config(config, quantize, dtype),
            # 4-bit weights are made on the device where they stay; others are moved later.
            device_map={"": own_device()},
            output_loading_info=True,
            local_files_only=True,
        )
    except (ImportError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {error}") from None
    problems = [
        str(key)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        for key in info[kind]
        if not str(key).endswith(OPTIONAL_SUFFIX)
    ]
    if problems:
        raise CheckpointError(f"{folder}: weights were not loaded whole: {first_few(problems)}")
    settle_quantized(model, quantize)
    loaded: CogVLMForCausalLM = model
    return loaded


def build_model(
    config: Mapping[str, Any],
    *,
    dtype: str | torch.dtype = "float32",
    attention: str = "sdpa",
) -> CogVLMForCausalLM:
    """A model with fresh weights from configuration fields; seed torch before the call.

    Raises:
        CheckpointError: a field is unknown (the nearest known one is named) or sizes contradict.
    """
    model: CogVLMForCausalLM = CogVLMForCausalLM._from_config(
        make_config(config), dtype=torch_dtype(dtype), attn_implementation=attention
    )
    return model


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights, in the index's order.

    Raises:
        CheckpointError: there are none, a shard is missing, or only pickled `.bin` files are there.
    """
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    index = folder / INDEX
    if index.is_file():
        names = shard_names(index)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{folder}: {len(missing)} of {len(names)} weight files are missing "
                f"({first_few(missing)}); fetch them again"
            )
        return [folder / name for name in names]
    if any(folder.glob("*.bin")):
        raise CheckpointError(
            f"{folder} holds only pickled .bin weights, which can run code when read; expected "
            "*.safetensors"
        )
    raise CheckpointError(
        f"{folder} holds no weights; expected model.safetensors or "
        "model.safetensors.index.json with its shards"
    )


def save_checkpoint(
    model: CogVLMForCausalLM,
    processor: CogVLMProcessor,
    out: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> Path:
    """Write a checkpoint in the released layout, with tokenizer and processor beside the weights.

    It appears whole or not at all (`staging`).

    Args:
        model: the model, unwrapped.
        processor: saved next to it.
        out: target folder, holding no checkpoint yet.
        dtype: the weights are written in this dtype; None keeps theirs.
        state_dict: gathered weights of a sharded model, in place of the model's own.

    Raises:
        CheckpointError: `out` holds a checkpoint already, or cannot be written.
    """
    with staged(out) as folder:
        weights = model.state_dict() if state_dict is None else dict(state_dict)
        if dtype is not None:
            wanted = torch_dtype(dtype)
            weights = {
                name: tensor.to(wanted) if tensor.is_floating_point() else tensor
                for name, tensor in weights.items()
            }
        model.save_pretrained(folder, state_dict=weights, max_shard_size=_SHARD_SIZE)
        if dtype is not None:
            _write_dtype(folder / "config.json", torch_dtype(dtype))
        save_processor(processor, folder)
    return Path(out)


def _write_dtype(file: Path, dtype: torch.dtype) -> None:
    """save_pretrained writes the module's dtype (fp32 masters), not that of the weights on disk."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config["dtype"] = str(dtype).removeprefix("torch.")
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _check_tensors(folder: Path, config: CogVLMConfig) -> dict[str, Header]:
    """Compare names and shapes in the safetensors headers with the model's, before loading.

    Raises:
        CheckpointError: a file is damaged, or tensors are missing, unexpected or misshapen.
    """
    headers = read_headers(weight_files(folder))
    check_fit(
        folder,
        {name: header.shape for name, header in headers.items()},
        expected_shapes(config),
        {name: header.file for name, header in headers.items()},
        optional=OPTIONAL_SUFFIX,
    )
    for name, header in headers.items():
        if header.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{header.file}: {name} is of dtype {header.dtype}, expected "
                f"{' or '.join(WEIGHT_DTYPES)}"
            )
    return headers


def expected_shapes(config: CogVLMConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a configuration, in the model's order; nothing is drawn."""
    with torch.device("meta"):
        model = CogVLMForCausalLM(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def own_device() -> str:
    """Where this process computes, by accelerate's rule: it may see its own GPU alone."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{launch.local_rank() % torch.cuda.device_count()}"


def torch_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype from its name.

    Raises:
        CheckpointError: there is no such dtype.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"unknown dtype {dtype!r}; expected float32 or bfloat16")
    return found


__all__ = [
    "OPTIONAL_SUFFIX",
    "build_model",
    "build_processor",
    "expected_shapes",
    "load_config",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "make_config",
    "own_device",
    "save_checkpoint",
    "save_processor",
    "stored_weights",
    "torch_dtype",
    "weight_files",
]
