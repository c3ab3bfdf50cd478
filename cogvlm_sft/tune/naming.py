"""Names that adapters are made of: the linears of each group, PEFT's files and its prefix.

Apart from `adapters.py`, so that whoever only looks whether a folder holds an adapter need not
import PEFT, which takes seconds.
"""

import re

from torch import nn

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
# In the file's metadata, as JSON: groups in 4 bits and from which dtype; pixels a side.
QUANTIZED_NOTE = "quantized"
IMAGE_SIZE_NOTE = "image_size"
PREFIX = "base_model.model."  # PEFT's, before every name in the file

# Module names of the linears that LoRA wraps, by group: facts of the released checkpoint's index.
LINEARS = {
    "language": r"model\.layers\.\d+\.(self_attn\.language_expert_(query_key_value|dense)"
    r"|mlp\.language_mlp\.(gate|up|down)_proj)",
    "visual_expert": r"model\.layers\.\d+\.(self_attn\.vision_expert_(query_key_value|dense)"
    r"|mlp\.vision_mlp\.(gate|up|down)_proj)",
    "adapter": r"model\.vision\.linear_proj\.(linear_proj|gate_proj|dense_h_to_4h|dense_4h_to_h)",
    "vision_tower": r"model\.vision\.transformer\.layers\.\d+\.(attention\.(query_key_value|dense)"
    r"|mlp\.fc[12])",
}


def linears_of(model: nn.Module, group: str) -> list[str]:
    """Names of a group's linears, in the model's order; one that PEFT has wrapped counts once."""
    pattern = re.compile(LINEARS[group])
    return [name for name, _ in model.named_modules() if pattern.fullmatch(name)]
