"""Golden figures of the released code and the slow oracle.

`golden/` is CogVLM, `golden_v2/` CogVLM2 (grouped-query attention, bias on the vision QKV, RoPE
base 500000, stride-2 convolution); a test that asks for `golden` runs on both. `model.safetensors`
and `config.json` are a model of 2 + 3 layers with random weights in the released layout;
`cases.safetensors` holds inputs (integers as int16), every eighth column of the logits, and
greedily generated tokens; `cases.json` losses, gradient norms and five AdamW steps. All were
computed in fp32 with the released model code.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from cogvlm_sft.model import CogVLMConfig, CogVLMForCausalLM

HERE = Path(__file__).parent


@pytest.fixture(scope="session", params=["golden", "golden_v2"])
def golden(request: pytest.FixtureRequest) -> Path:
    return HERE / request.param


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("oracle", HERE / "oracle.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cases(golden: Path) -> dict[str, dict[str, dict[str, torch.Tensor]]]:
    """case -> {"in" | "out"} -> name -> tensor."""
    found: dict = {}
    for key, tensor in load_file(golden / "cases.safetensors").items():
        side, case, name = key.split("/")
        if tensor.dtype == torch.int16:
            tensor = tensor.long()
        found.setdefault(case, {"in": {}, "out": {}})[side][name] = tensor
    return found


@pytest.fixture(scope="session")
def figures(golden: Path) -> dict:
    return json.loads((golden / "cases.json").read_text())


@pytest.fixture
def model(golden: Path) -> CogVLMForCausalLM:
    return CogVLMForCausalLM.from_pretrained(golden)


@pytest.fixture
def small_config():
    """Builds a configuration of test size; keyword arguments override."""

    def build(**changes) -> CogVLMConfig:
        vision = {
            "hidden_size": 24, "image_size": 56, "intermediate_size": 32, "num_heads": 2,
            "num_hidden_layers": 2, "num_positions": 17, "patch_size": 14,
        }  # fmt: skip
        fields = {
            "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "initializer_range": 0.2, "vision_config": vision,
        }  # fmt: skip
        return CogVLMConfig(**{**fields, **changes})

    return build


@pytest.fixture
def make_batch():
    """Builds inputs from rows such as "i5" (an image, five words) or "3i2i4", padded."""

    def build(config: CogVLMConfig, rows: list[str], side: str = "right", seed: int = 1) -> dict:
        generator = torch.Generator().manual_seed(seed)
        block = config.num_image_tokens
        ids, types = [], []
        for row in rows:
            row_ids, row_types = [config.bos_token_id], [0]
            for letter in row:
                count = block if letter == "i" else int(letter)
                if letter == "i":
                    row_ids += [config.pad_token_id] * count
                else:
                    words = torch.randint(3, config.vocab_size, (count,), generator=generator)
                    row_ids += words.tolist()
                row_types += [int(letter == "i")] * count
            ids.append(row_ids)
            types.append(row_types)
        longest = max(map(len, ids))

        def pad(values: list[list[int]], fill: int) -> torch.Tensor:
            padded = []
            for row in values:
                extra = [fill] * (longest - len(row))
                padded.append(extra + row if side == "left" else row + extra)
            return torch.tensor(padded)

        images = sum(row.count("i") for row in rows)
        size = config.vision_config.image_size
        batch = {
            "input_ids": pad(ids, config.pad_token_id),
            "token_type_ids": pad(types, 0),
            "attention_mask": pad([[1] * len(row) for row in ids], 0),
        }
        if images:
            batch["pixel_values"] = torch.randn(images, 3, size, size, generator=generator)
        return batch

    return build
