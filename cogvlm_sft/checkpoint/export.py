"""A checkpoint for others: released layout, tokenizer, processor, card, and the code to load it.

What comes out loads with transformers alone (`remote_code`), and with the engines that know CogVLM:
names, shapes and the keys of config.json are the released ones, `tokenizer.model` lies beside
`tokenizer.json` where the source had it, and keys that only transformers writes stay out of
`vision_config`. Weights are copied tensor by tensor. Nothing leaves the machine unless a repository
is named.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cogvlm_sft.checkpoint.adapter import is_adapter
from cogvlm_sft.checkpoint.load import (
    OPTIONAL_SUFFIX,
    expected_shapes,
    load_config,
    load_processor,
    save_processor,
    torch_dtype,
    weight_files,
)
from cogvlm_sft.checkpoint.remote_code import (
    MODEL_AUTO_MAP,
    PROCESSOR_AUTO_MAP,
    write_remote_code,
)
from cogvlm_sft.checkpoint.staging import staged
from cogvlm_sft.checkpoint.weights import (
    Planned,
    check_fit,
    dtype_of,
    read_headers,
    read_tensor,
    write_weights,
)
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.model import CogVLMConfig, CogVLMProcessor
from cogvlm_sft.model.attention_cogvlm import inverse_frequencies
from cogvlm_sft.tune.groups import GROUPS, group_of

# The released config.json's keys, in its order; the two of CogVLM2 and of other bases where set.
_KEYS = (
    "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "num_multi_query_heads", "rms_norm_eps", "rope_theta",
    "template_version", "tie_word_embeddings", "use_cache", "vocab_size",
)  # fmt: skip


def export_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
) -> Path:
    """Writes a checkpoint that loads without cogvlm-sft.

    Args:
        source: folder of a run or any checkpoint in the released layout.
        out: new folder.
        tokenizer: tokenizer folder, where the source holds none.
        dtype: of the weights on the disk; None keeps theirs.
        shard_bytes: most bytes of a weight file.

    Returns:
        `out`.

    Raises:
        CheckpointError: the source is damaged, incomplete, an adapter, or without tokenizer.
    """
    folder = Path(source)
    if is_adapter(folder):
        raise CheckpointError(
            f"{folder} is an adapter; merge it first: cogvlm-sft checkpoint merge {folder} "
            f"--out {out}-merged"
        )
    config = load_config(folder)
    headers = read_headers(weight_files(folder))
    shapes = expected_shapes(config)
    check_fit(
        folder,
        {name: header.shape for name, header in headers.items()},
        shapes,
        {name: header.file for name, header in headers.items()},
        optional=OPTIONAL_SUFFIX,
    )
    processor = load_processor(folder, tokenizer)
    kept = torch_dtype(dtype) if dtype else dtype_of(headers["model.norm.weight"])
    planned = [
        Planned(
            name,
            shape,
            kept,
            partial(read_tensor, name, headers[name])
            if name in headers
            else partial(inverse_frequencies, config),
        )
        for name, shape in shapes.items()
    ]
    with staged(out) as staging:
        write_weights(staging, planned, shard_bytes=shard_bytes, label="export")
        _write_json(staging / "config.json", released_config(config, kept))
        _write_json(staging / "generation_config.json", _generation(config))
        save_processor(processor, staging)
        _map_processor(staging / "processor_config.json")
        write_remote_code(staging)
        card = model_card(config, planned, processor, _recipe(folder))
        (staging / "README.md").write_text(card, encoding="utf-8")
    return Path(out)


def push_checkpoint(folder: str | Path, repository: str, *, public: bool = False) -> str:
    """Uploads an exported folder with huggingface_hub's own client and its stored login.

    Args:
        folder: what `export_checkpoint` wrote.
        repository: OWNER/NAME; it is created where it does not exist.
        public: whether a repository that is created can be seen by everyone.

    Returns:
        Address of the upload.

    Raises:
        CheckpointError: the hub refused, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi()
    try:
        api.create_repo(repository, private=not public, exist_ok=True)
        return str(api.upload_folder(folder_path=Path(folder), repo_id=repository))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"{repository}: cannot be uploaded: {error}; the export itself is whole in {folder}"
        ) from None


def released_config(config: CogVLMConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The contents of config.json with the released keys alone, and where the classes are."""
    fields = config.to_dict()
    return {
        "architectures": ["CogVLMForCausalLM"],
        "auto_map": MODEL_AUTO_MAP,
        **{key: fields[key] for key in _KEYS if key in fields},
        "torch_dtype": str(dtype).removeprefix("torch."),
        "vision_config": dict(config.vision_config),
    }


def model_card(
    config: CogVLMConfig, tensors: list[Planned], processor: CogVLMProcessor, recipe: str | None
) -> str:
    """README.md: what it is, how it is used, and the recipe it was trained by."""
    counts = dict.fromkeys(GROUPS, 0)
    for tensor in tensors:
        if not tensor.name.endswith(OPTIONAL_SUFFIX):
            counts[group_of(tensor.name)] += torch.Size(tensor.shape).numel()
    table = "\n".join(f"| {group} | {count:,} |" for group, count in counts.items())
    name = "CogVLM2" if config.is_cogvlm2 else "CogVLM"
    size = config.vision_config.image_size
    trained = f"\n## Trained by\n\n```yaml\n{recipe.strip()}\n```\n" if recipe else ""
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [cogvlm]
---

# A {name} of {sum(counts.values()):,} parameters

Pictures of {size} px take {config.num_image_tokens:,} tokens; the prompts' style is
`{processor.style}`. The weights have the released layout of CogVLM. They inherit the licences of
what they were trained from and on: name them here before you share this folder.

| parameters | |
|---|---|
{table}
| total | {sum(counts.values()):,} |

## Use

The Python files beside this card are the model's code, written by cogvlm-sft; transformers 5.17 or
newer runs them when you allow it.

```python
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

folder = "."  # this folder, or its repository
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
inputs = processor(
    images=Image.open("picture.png"), text="What is in the picture?", style="{processor.style}",
    return_tensors="pt",
)
inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
tokens = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(tokens[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```
{trained}"""


def _generation(config: CogVLMConfig) -> dict[str, Any]:
    return {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}


def _map_processor(file: Path) -> None:
    """Names the classes of processor and image processor where transformers looks for them."""
    content = json.loads(file.read_text(encoding="utf-8"))
    content["auto_map"] = PROCESSOR_AUTO_MAP
    content["image_processor"]["auto_map"] = {
        "AutoImageProcessor": PROCESSOR_AUTO_MAP["AutoImageProcessor"]
    }
    _write_json(file, content)


def _recipe(folder: Path) -> str | None:
    """The resolved recipe of a run's folder."""
    file = folder / "recipe.yaml"
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
