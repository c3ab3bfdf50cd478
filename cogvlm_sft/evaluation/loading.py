"""A checkpoint to ask: on this process's device, in the dtype that is fast there, or in 4 bits.

Scoring and talking load alike. Notable choice: an adapter that was trained beside 4-bit weights is
asked beside the same ones when 4 bits are wanted: what fitted the card while it learned fits it
afterwards, and the answers are those of the model that was trained.
"""

from pathlib import Path
from typing import Literal

from cogvlm_sft.checkpoint.adapter import is_adapter, quantized_groups
from cogvlm_sft.checkpoint.load import load_model, own_device
from cogvlm_sft.model import CogVLMForCausalLM
from cogvlm_sft.recipe import QuantizeSection


def open_model(
    checkpoint: Path | str,
    *,
    dtype: str | None = None,
    quantize: Literal["nf4"] | None = None,
) -> CogVLMForCausalLM:
    """Loads a checkpoint or an adapter with its base.

    Args:
        checkpoint: Checkpoint or adapter folder.
        dtype: Of the weights; bfloat16 on a GPU and float32 on a CPU where it is not given.
        quantize: `nf4` holds the linears of the language model and the visual expert (or those that
            an adapter was trained beside) in 4 bits: a 17B checkpoint then takes 16 GB, not 35.

    Raises:
        CheckpointError: The folder is missing or is not a whole checkpoint.
    """
    device = own_device()
    folder = Path(checkpoint)
    groups: list[str] = []
    if quantize is not None:
        trained = quantized_groups(folder) if is_adapter(folder) else None
        groups = list(trained[0] if trained else QuantizeSection(type=quantize).groups)
    return load_model(
        folder, dtype=dtype or default_dtype(device), quantize=groups, device=device
    ).eval()


def describe_weights(model: CogVLMForCausalLM) -> str:
    """What the products run in, in words: part of a protocol, since 4 bits change answers."""
    dtype = str(model.dtype).removeprefix("torch.")
    if not getattr(model, "is_loaded_in_4bit", False):
        return dtype
    held = sum(type(parameter).__name__ == "Params4bit" for parameter in model.parameters())
    return f"{held} linears in 4 bits (NF4), the rest in {dtype}"


def default_dtype(device: str) -> str:
    """bfloat16 on a GPU; float32 on a CPU, where bfloat16 can be forty times slower."""
    return "float32" if device == "cpu" else "bfloat16"
