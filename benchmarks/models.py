"""The configurations and batches that the benchmarks run on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cogvlm_sft.data.packing import SharedImageCollator
from cogvlm_sft.model import (
    CogVLMConfig,
    CogVLMForCausalLM,
    CogVLMImageProcessor,
    CogVLMProcessor,
)

# 90,572,544 parameters; 256 patches, 258 image tokens.
MEDIUM = {
    "vocab_size": 32000,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "vision_config": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_heads": 4,
        "image_size": 224,
        "num_positions": 257,
    },
}


def build(fields: dict[str, Any], attention: str = "sdpa") -> CogVLMForCausalLM:
    """A model with random weights in training mode, its tower frozen as in chat alignment."""
    torch.manual_seed(0)
    model = CogVLMForCausalLM(CogVLMConfig(**fields)).train()
    model.set_attn_implementation(attention)
    for part in (model.model.vision.patch_embedding, model.model.vision.transformer):
        part.requires_grad_(False)
    return model


def items_of(config: CogVLMConfig, texts: Sequence[int], supervised: int,
             per_picture: int = 1) -> list[dict[str, Any]]:  # fmt: skip
    """Conversations of BOS, a picture and so many text tokens, the last ones supervised.

    Args:
        config: of the model.
        texts: tokens of text of each conversation.
        supervised: of them, at the end.
        per_picture: so many conversations that follow each other are about one picture.
    """
    block, side = config.num_image_tokens, config.vision_config.image_size
    items: list[dict[str, Any]] = []
    for number, count in enumerate(texts):
        words = torch.randint(3, config.vocab_size, (count,)).tolist()
        pixels = torch.randn(1, 3, side, side)
        if number % per_picture:
            pixels = items[-1]["images"]
        items.append(
            {
                "input_ids": [1, *[0] * block, *words],
                "token_type_ids": [0, *[1] * block, *[0] * count],
                "labels": [-100] * (1 + block + count - supervised) + words[-supervised:],
                "pictures": (str(number // per_picture),),
                "images": pixels,
            }
        )
    return items


def padded(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Conversations as a right-padded batch."""
    longest = max(len(item["input_ids"]) for item in items)

    def fill(name: str, value: int) -> torch.Tensor:
        return torch.tensor([i[name] + [value] * (longest - len(i[name])) for i in items])

    batch = {"input_ids": fill("input_ids", 0), "token_type_ids": fill("token_type_ids", 0),
             "labels": fill("labels", -100)}  # fmt: skip
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    batch["pixel_values"] = torch.cat([item["images"] for item in items])
    return batch


def shared(config: CogVLMConfig, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Conversations packed into one row, each picture once."""
    processor: Any = SimpleNamespace(num_image_tokens=config.num_image_tokens)
    return SharedImageCollator(processor)(items)


def processor_for(config: CogVLMConfig) -> CogVLMProcessor:
    """With a tokenizer that knows one word."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "word": 3}
    tokenizer = Tokenizer(models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return CogVLMProcessor(
        CogVLMImageProcessor.for_config(config),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        ),
    )  # fmt: skip


RESULTS = Path("benchmarks/results")
