"""4-bit loading: which linears are held in NF4, and the proof that they are those and no others.

bitsandbytes quantises each weight as it is read: a 17B model never stands in memory in 16 bits.
transformers takes a list of modules to *skip*, matched as prefixes and suffixes (a "vision" in it
skips nothing of `model.vision`); the list given here holds whole names, and the 4-bit modules of
the loaded model are compared with those that were meant.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.model import CogVLMConfig, CogVLMForCausalLM
from cogvlm_sft.tune.naming import linears_of


def nf4_config(
    config: CogVLMConfig, groups: Collection[str], dtype: torch.dtype
) -> BitsAndBytesConfig | None:
    """What `from_pretrained` needs to hold the linears of these groups in NF4; None for no group.

    Args:
        config: the model's.
        groups: of `language`, `visual_expert`, `vision_tower`.
        dtype: that products run in and everything else is held in.
    """
    if not groups:
        return None
    with torch.device("meta"):
        model = CogVLMForCausalLM(config)
    wanted = {name for group in groups for name in linears_of(model, group)}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[name for name in linears if name not in wanted],
    )


def settle_quantized(model: nn.Module, groups: Collection[str]) -> None:
    """Compare the 4-bit linears of a loaded model with those of the groups, and keep them as read.

    On CPUs with bf16 instructions bitsandbytes repacks a weight at its first use in eval mode, with
    scales rounded to bf16, and its kernel dies (SIGFPE) of an expert without rows: a held-out loss
    in mid-run would change the base that is trained on. That path is switched off.

    Raises:
        CheckpointError: they differ.
    """
    from bitsandbytes.nn import Linear4bit  # seconds of import, for 4-bit models only

    wanted = {name for group in groups for name in linears_of(model, group)}
    found = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    if found != wanted:
        raise CheckpointError(
            f"{len(found)} linears are held in 4 bits, expected the {len(wanted)} of "
            f"{', '.join(groups)}; the first that differs is {min(found ^ wanted)}"
        )
    for name in found:
        linear: Any = model.get_submodule(name)
        linear.support_avx512bf16_for_cpu = False
