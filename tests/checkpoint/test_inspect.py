"""`checkpoint inspect`: what it says of each kind, from headers alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cogvlm_sft.checkpoint.inspect import inspect_checkpoint
from cogvlm_sft.checkpoint.layout import entries
from cogvlm_sft.checkpoint.load import make_config
from cogvlm_sft.cli import main
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.model import CogVLMConfig, CogVLMForCausalLM
from cogvlm_sft.tune.groups import group_of
from tests.checkpoint.conftest import CONFIG, GOLDEN
from tests.checkpoint.test_sat import write_sat

SECOND = {"num_multi_query_heads": 8, "vocab_size": 128256, "intermediate_size": 14336,
          "vision_config": {"image_size": 1344, "num_positions": 9217}}  # fmt: skip


@pytest.mark.parametrize("fields", [{}, SECOND, CONFIG], ids=["cogvlm", "cogvlm2", "tiny"])
def test_layout_is_the_model(fields: dict) -> None:
    config = make_config(fields)
    with torch.device("meta"):
        model = CogVLMForCausalLM(config)
    found = {entry.name: (entry.shape, entry.group) for entry in entries(config.to_dict())}
    assert found == {
        name: (tuple(parameter.shape), group_of(name))
        for name, parameter in model.named_parameters()
    }


def sparse_released(folder: Path, shards: int = 8, **fields: Any) -> Path:
    """The released chat model as files without contents: 35 GB that take no room."""
    folder.mkdir()
    config = CogVLMConfig(**fields).to_dict()
    tensors = sorted(entries(config))
    share = -(-len(tensors) // shards)
    weight_map = {}
    for number in range(shards):
        name = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        header, end = {}, 0
        for entry in tensors[number * share : (number + 1) * share]:
            start, end = end, end + 2 * torch.Size(entry.shape).numel()
            header[entry.name] = {
                "dtype": "BF16", "shape": list(entry.shape), "data_offsets": [start, end],
            }  # fmt: skip
            weight_map[entry.name] = name
        text = json.dumps(header).encode()
        with (folder / name).open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    released = {key: value for key, value in config.items() if key != "model_type"}
    released["auto_map"] = {"AutoConfig": "configuration_cogvlm.CogVLMConfig"}
    (folder / "config.json").write_text(json.dumps(released))
    return folder


def test_released_at_full_size(tmp_path: Path) -> None:
    found = inspect_checkpoint(sparse_released(tmp_path / "cogvlm-chat-hf"))
    assert found.problems == []
    assert sum(found.parameters.values()) == 17_639_685_376
    assert found.parameters["visual_expert"] == 6_476_005_376
    assert found.dtypes == {"BF16": 1155}
    text = found.table()
    for words in ("released layout, CogVLM\n", "490 px, 1,227 tokens", "35.28 GB", "chat", "none"):
        assert words in text


def test_released_cogvlm2_at_full_size(tmp_path: Path) -> None:
    folder = sparse_released(tmp_path / "cogvlm2-llama3-chat-19B", **SECOND, pad_token_id=128002)
    config = json.loads((folder / "config.json").read_text())
    del config["num_multi_query_heads"]  # as released: its Python code has it
    (folder / "config.json").write_text(json.dumps(config))
    found = inspect_checkpoint(folder)
    assert found.problems == [] and found.model == "CogVLM2"
    assert sum(found.parameters.values()) == 19_503_105_280
    assert found.details["resolution"] == "1344 px, 2,306 tokens a picture"


def test_torch_is_not_loaded(tmp_path: Path) -> None:
    folder = sparse_released(tmp_path / "cogvlm-chat-hf")
    code = (
        "import sys; from cogvlm_sft.cli import main; "
        f"main(['checkpoint', 'inspect', {str(folder)!r}]); "
        "assert not {'torch', 'transformers', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_each_kind(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["checkpoint", "inspect", str(checkpoint)]) == 0
    assert "ours, with its processor, CogVLM\n" in capsys.readouterr().out
    assert inspect_checkpoint(GOLDEN / "golden_v2").model == "CogVLM2"
    sat = inspect_checkpoint(write_sat(checkpoint, tmp_path / "sat", ranks=2, lora=2))
    ours = inspect_checkpoint(checkpoint)
    assert sat.kind == "SAT, 2 rank(s), LoRA beside the weights"
    assert sat.parameters == ours.parameters and not sat.problems
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": "/gone", "r": 8}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    found = inspect_checkpoint(adapter)
    assert found.kind == "adapter (LORA)" and found.details["rank"] == "8"
    assert "adapter_model.safetensors is missing" in found.problems
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        inspect_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"hidden_size": "64"}, "hidden_size is '64', expected a whole number from 1"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"vision_config": []}, "no vision_config in it, so this is not a CogVLM"),
    ],
)
def test_sizes_that_are_none(checkpoint: Path, tmp_path: Path, change: dict, said: str) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=said):
        inspect_checkpoint(tmp_path)


def test_what_loading_would_refuse(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"] |= {"num_heads": 5, "image_size": 57}
    config["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = (checkpoint / "model.safetensors").read_bytes()
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(weights)
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    problems = " / ".join(inspect_checkpoint(tmp_path).problems)
    for words in (
        "17 positions do not fit pictures of 57 px",
        "not a multiple of its num_heads",
        "tie_word_embeddings is true",
        "stands in b.safetensors and in another file",
    ):
        assert words in problems
    index = {"weight_map": {"x": "../a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names '../a.safetensors'" in " / ".join(inspect_checkpoint(tmp_path).problems)


def test_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = sparse_released(tmp_path / "cogvlm")
    third = folder / "model-00003-of-00008.safetensors"
    with third.open("r+b") as stream:
        stream.truncate(third.stat().st_size - 1)
    (folder / "model-00005-of-00008.safetensors").unlink()
    assert main(["checkpoint", "inspect", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "problem: model-00005-of-00008.safetensors is missing" in printed
    assert "model-00003-of-00008.safetensors: " in printed and "incomplete" in printed
