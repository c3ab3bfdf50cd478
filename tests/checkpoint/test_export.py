"""Exports: they load where cogvlm-sft is not, and engines find what they look for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cogvlm_sft.checkpoint.export import export_checkpoint, push_checkpoint
from cogvlm_sft.checkpoint.load import load_model, load_processor
from cogvlm_sft.cli import main
from cogvlm_sft.errors import CheckpointError
from tests.checkpoint.conftest import GOLDEN, assert_same, tensors_of

# What a machine without this project does; the imports that it does not have are refused.
ALONE = """
import json, sys
for name in ("cogvlm_sft", "trl", "peft", "bitsandbytes", "sentencepiece"):
    sys.modules[name] = None
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor
folder = sys.argv[1]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
inputs = processor(images=Image.new("RGB", (40, 30), (200, 30, 40)), text="What digit is this?",
                   style="chat", return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
with torch.no_grad():
    logits = model(**inputs).logits[0, -1].tolist()
print(json.dumps([tokens.tolist(), logits]))
"""


@pytest.fixture(params=["golden", "golden_v2"])
def source(request: pytest.FixtureRequest) -> Path:
    """The released code's CogVLM and CogVLM2, as files."""
    return GOLDEN / request.param


@pytest.mark.slow
def test_loads_with_transformers_alone(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    out = export_checkpoint(source, tmp_path / "export", tokenizer=tokenizer)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    answered = subprocess.run(
        [sys.executable, "-c", ALONE, str(out)],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert answered.returncode == 0, answered.stderr
    tokens, logits = json.loads(answered.stdout.splitlines()[-1])
    model, processor = load_model(source), load_processor(source, tokenizer)
    picture = Image.new("RGB", (40, 30), (200, 30, 40))
    inputs = processor(picture, "What digit is this?", style="chat", return_tensors="pt")
    greedy = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert model.generate(**inputs, **greedy).tolist() == tokens
    with torch.no_grad():
        ours = model(**inputs).logits[0, -1]
    torch.testing.assert_close(ours, torch.tensor(logits), atol=1e-5, rtol=0)


def test_released_ours_released(source: Path, tokenizer: Path, tmp_path: Path) -> None:
    """The same bytes of weights, the same keys of config.json, also by way of our own saving."""
    model = load_model(source)
    model.save_pretrained(tmp_path / "ours")
    out = export_checkpoint(tmp_path / "ours", tmp_path / "export", tokenizer=tokenizer)
    assert_same(tensors_of(source), tensors_of(out))
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, out))
    assert after["vision_config"] == before["vision_config"]
    for key in after.keys() - {"auto_map", "torch_dtype"}:
        assert after[key] == before[key], key
    # How LMDeploy and the ports of the released code read the tower's configuration.
    assert vars(Namespace(**model.config.vision_config)) == before["vision_config"]
    assert model.config.vision_config["num_positions"] == 17
    # LMDeploy takes the key's presence for CogVLM2, and asks the object for it with a default.
    assert ("num_multi_query_heads" in after) == ("v2" in source.name)
    assert getattr(model.config, "num_multi_query_heads", 4) == (2 if "v2" in source.name else 4)
    assert (out / "tokenizer.model").read_bytes() == (tokenizer / "tokenizer.model").read_bytes()
    assert "AutoProcessor" in json.loads((out / "processor_config.json").read_text())["auto_map"]
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {k: before[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # And back again: an export is a checkpoint like any other, its code never run.
    (out / "configuration_cogvlm.py").write_text("raise SystemExit('remote code was run')")
    again = load_model(out).config.to_dict()
    assert {**again, "_name_or_path": ""} == {**model.config.to_dict(), "_name_or_path": ""}


def test_several_shards_and_another_dtype(checkpoint: Path, tmp_path: Path) -> None:
    out = export_checkpoint(checkpoint, tmp_path / "out", dtype="bfloat16", shard_bytes=30_000)
    shards = sorted(out.glob("model-*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(shards) > 3 and {s.name for s in shards} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())
    truth = {name: tensor.bfloat16() for name, tensor in tensors_of(checkpoint).items()}
    assert_same(truth, tensors_of(out))
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_export_imports_nothing_of_ours(checkpoint: Path, tmp_path: Path) -> None:
    out = export_checkpoint(checkpoint, tmp_path / "out")
    for file in out.glob("*.py"):
        text = file.read_text()
        assert not re.search(r"^\s*(from|import) cogvlm_sft", text, re.MULTILINE), file.name
        for name in re.findall(r"^\s*from \.(\w+) import", text, re.MULTILINE):
            assert (out / f"{name}.py").is_file(), f"{file.name} needs {name}"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # gguf 0.19 on numpy 2.3
def test_gguf_tensor_names(checkpoint: Path, tmp_path: Path) -> None:
    """llama.cpp's own table maps every tensor: language model, visual expert, tower and adapter."""
    gguf = pytest.importorskip("gguf")
    out = export_checkpoint(checkpoint, tmp_path / "export")
    config = json.loads((out / "config.json").read_text())
    layers = config["num_hidden_layers"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.COGVLM, layers)
    projector = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "cogvlm")
    writer.add_block_count(layers)
    kept = {}
    for name, tensor in tensors_of(out).items():
        if name.endswith("inv_freq"):
            continue  # computed
        if name.startswith("model.vision."):  # goes to the projector's file
            assert projector.get_name(name, try_suffixes=(".weight", ".bias")), name
            continue
        found = names.get_name(name, try_suffixes=(".weight",))
        assert found is not None, name
        kept[found] = np.ascontiguousarray(tensor.numpy())
        writer.add_tensor(found, kept[found])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    block = ("attn_norm", "ffn_norm", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down",
             "vis_attn_qkv", "vis_attn_output", "vis_gate", "vis_up", "vis_down")  # fmt: skip
    expected = {f"blk.{n}.{part}.weight" for n in range(layers) for part in block}
    assert read.keys() == expected | {"token_embd.weight", "output.weight", "output_norm.weight"}
    for name, array in kept.items():
        assert np.array_equal(read[name], array), name


def test_command_uploads_only_when_told(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, repository: str, **kwargs: Any) -> None:
            calls.append((repository, kwargs))

        def upload_folder(self, **kwargs: Any) -> str:
            calls.append(("upload", kwargs))
            return "https://hub/owner/name"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    arguments = ["checkpoint", "export", str(checkpoint), "--out"]
    assert main([*arguments, str(tmp_path / "one")]) == 0 and not calls
    two = tmp_path / "two"
    assert main([*arguments, str(two), "--push-to-hub", "owner/name"]) == 0
    assert calls == [
        ("owner/name", {"private": True, "exist_ok": True}),
        ("upload", {"folder_path": two, "repo_id": "owner/name"}),
    ]


def test_upload_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(CheckpointError, match="owner/name: cannot be uploaded: no route"):
        push_checkpoint(tmp_path, "owner/name")


def test_what_cannot_be_exported(checkpoint: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge it first"):
        export_checkpoint(adapter, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no tokenizer"):
        export_checkpoint(GOLDEN / "golden", tmp_path / "out")
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        export_checkpoint(checkpoint, checkpoint)
    assert not (tmp_path / "out").exists()
