"""Adapter folders: where their base is, and putting one on a model, ours or PEFT's own.

An adapter run's result, each of its snapshots, and what other tools wrote for a CogVLM (CogVLM2's
official fine-tuning among them) are all the same thing: `adapter_config.json` beside
`adapter_model.safetensors`. PEFT itself loads without looking for what is missing or unexpected;
here every tensor of the file must have found its place. Beside factors a file may hold whole
weights (ours, PEFT's `modules_to_save` and `bias`, an embedding's own), all under their own names.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.model import CogVLMForCausalLM
from cogvlm_sft.tune.naming import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    IMAGE_SIZE_NOTE,
    LINEARS,
    PREFIX,
    QUANTIZED_NOTE,
)

if TYPE_CHECKING:  # seconds of import that a plain checkpoint does not need
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

ADAPTER_NAME = "default"  # PEFT's, for the one adapter that a model has
_MAGNITUDE = "lora_magnitude_vector"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and not a whole model."""
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def adapter_settings(folder: Path) -> dict[str, Any]:
    """The contents of `adapter_config.json`.

    Raises:
        CheckpointError: it is not a LoRA adapter's, or its weights are missing or a pickle.
    """
    file = folder / ADAPTER_CONFIG
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = settings["peft_type"]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: not an adapter's configuration: {error!r}") from None
    if kind != "LORA":
        raise CheckpointError(f"{file}: the adapter is of type {kind}, expected LORA")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise CheckpointError(
            f"{folder} holds no {ADAPTER_WEIGHTS}; older .bin files are pickles, which can run "
            "code when read, and are not opened"
        )
    return settings


def base_of(folder: Path, base: str | Path | None = None) -> Path:
    """The checkpoint folder that an adapter belongs to.

    Args:
        folder: the adapter.
        base: takes the place of what the adapter says.

    Raises:
        CheckpointError: there is no such folder, or it holds an adapter itself.
    """
    named = adapter_settings(folder).get("base_model_name_or_path") if base is None else base
    if not named or not isinstance(named, str | Path):
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} names no base checkpoint (found {named!r}); give its folder"
        )
    path = named_checkpoint(str(named), folder) if base is None else Path(base)
    if path is None or not path.is_dir():
        raise CheckpointError(
            f"{folder}: its base checkpoint {named} does not exist here; expected a folder in the "
            "released layout. Run where the training ran, or name the folder (`checkpoint merge "
            "--base`, `load_model(base=…)`)"
        )
    if is_adapter(path):
        raise CheckpointError(f"{path}: a base must be a whole checkpoint, this is an adapter")
    return path


def named_checkpoint(name: str, folder: Path) -> Path | None:
    """A checkpoint that a run's files name, from wherever one stands now; None where it is gone.

    Args:
        name: as written there, relative to where the training was started.
        folder: of the run, which mostly lies below that place.
    """
    places = [Path(name), *(parent / name for parent in folder.resolve().parents)]
    return next((place for place in places if place.is_dir()), None)


def adapter_keys(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names (see `adapter_tensors`) and shapes of an adapter's tensors, from the file's header.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(file, framework="pt") as tensors:
            return {
                _plain_name(name): tuple(tensors.get_slice(name).get_shape())
                for name in tensors.keys()  # noqa: SIM118 - not a mapping
            }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: damaged or incomplete ({error})") from None


def adapter_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """An adapter's tensors: factors as `module.lora_A.weight`, whole weights under their own names.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        stored = load_file(folder / ADAPTER_WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: damaged ({error})") from None
    return {_plain_name(name): tensor for name, tensor in stored.items()}


def _plain_name(name: str) -> str:
    """Without PEFT's prefix and wrapper; PEFT writes DoRA's magnitudes without `.weight`."""
    name = name.removeprefix(PREFIX).replace(".base_layer.", ".")
    return f"{name}.weight" if name.endswith(_MAGNITUDE) else name


def lora_config(folder: Path) -> "LoraConfig":
    """PEFT's configuration of an adapter, for a model that gets its whole weights by their names.

    Raises:
        CheckpointError: see `adapter_settings`, or a value is not PEFT's.
    """
    from peft import LoraConfig

    adapter_settings(folder)
    try:
        config: LoraConfig = LoraConfig.from_pretrained(str(folder))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {error}") from None
    config.inference_mode = True
    config.modules_to_save = None  # else PEFT would keep a second copy of each
    config.trainable_token_indices = None  # deltas of single rows are not read
    return config


def quantized_groups(folder: Path) -> tuple[list[str], torch.dtype] | None:
    """Groups that were held in 4 bits while an adapter was trained, and the dtype they came from.

    None where they were not, or where another tool wrote the adapter and does not say.

    Raises:
        CheckpointError: the weights are missing or damaged.
    """
    found = _note(folder, QUANTIZED_NOTE)
    if found is None:
        return None
    try:
        groups, dtype = list(found["groups"]), getattr(torch, found["dtype"])
        strange = set(groups) - LINEARS.keys()
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / ADAPTER_WEIGHTS}: a damaged note: {error!r}") from None
    if strange or not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"{folder / ADAPTER_WEIGHTS}: a damaged note: groups {groups} in {found['dtype']}, "
            f"expected some of {', '.join(LINEARS)} and a dtype of torch"
        )
    return groups, dtype


def trained_image_size(folder: Path) -> int | None:
    """Pixels a side that an adapter was trained at, where they are not its base's.

    Raises:
        CheckpointError: the weights are missing or damaged.
    """
    size: int | None = _note(folder, IMAGE_SIZE_NOTE)
    return size


def _note(folder: Path, name: str) -> Any:
    file = folder / ADAPTER_WEIGHTS
    try:
        with safe_open(file, framework="pt") as tensors:
            note = (tensors.metadata() or {}).get(name)
        return None if note is None else json.loads(note)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file}: damaged or incomplete ({error})") from None


def wear_adapter(model: CogVLMForCausalLM, folder: Path, *, merge: bool) -> CogVLMForCausalLM:
    """Put an adapter on its base, every tensor of the file accounted for.

    Args:
        model: the base, plain or with 4-bit linears; changed in place.
        folder: the adapter.
        merge: add the factors to the weights, so that a plain model results; else they stay beside.

    Raises:
        CheckpointError: the adapter does not fit the model.
    """
    from peft import set_peft_model_state_dict  # as above

    tuner = add_factors(model, folder, lora_config(folder))
    set_peft_model_state_dict(model, load_file(folder / ADAPTER_WEIGHTS), ADAPTER_NAME)
    model.eval()
    if not merge:
        return model
    try:
        merged: CogVLMForCausalLM = tuner.merge_and_unload()
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: the adapter cannot be merged: {error}") from None
    return merged


def add_factors(model: CogVLMForCausalLM, folder: Path, config: "LoraConfig") -> "LoraModel":
    """Wraps an adapter's targets in PEFT's layers, with a place for every tensor of its file.

    Args:
        model: changed in place; on the meta device the factors are there too.
        folder: the adapter, of which only names and shapes are read.
        config: see `lora_config`.

    Raises:
        CheckpointError: a tensor is missing, has no place, or has another shape.
    """
    from peft.tuners.lora import LoraModel  # as above

    file, keys = folder / ADAPTER_WEIGHTS, adapter_keys(folder)
    meta = model.device.type == "meta"
    try:
        tuner = LoraModel(model, config, ADAPTER_NAME, low_cpu_mem_usage=meta)
    except (ValueError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"{folder}: the adapter does not fit the model: {error}") from None
    places = {
        _plain_name(name.replace(f".{ADAPTER_NAME}", "")): parameter
        for name, parameter in model.named_parameters()
    }
    if strange := sorted(keys.keys() - places.keys()):
        raise CheckpointError(
            f"{file}: {len(strange)} tensors have no place in this model with the targets "
            f"{config.target_modules}, first {strange[0]!r}; the adapter is of another base, or "
            "holds more than factors and whole weights"
        )
    if missing := sorted(name for name in places.keys() - keys.keys() if ".lora_" in name):
        module, _, factor = missing[0].partition(".lora_")
        raise CheckpointError(
            f"{file}: no lora_{factor.partition('.')[0]} for {module}, one of the targets "
            f"{config.target_modules}"
        )
    for name, shape in keys.items():
        if hasattr(places[name], "quant_state"):
            raise CheckpointError(
                f"{file}: holds {name} whole, which cannot take the place of 4-bit weights; merge "
                "the adapter (`cogvlm-sft checkpoint merge`), and quantise the result"
            )
        if tuple(places[name].shape) != shape:
            raise CheckpointError(
                f"{file}: {name} has shape {shape}, expected {tuple(places[name].shape)}; the "
                "adapter is of another base"
            )
    return tuner
