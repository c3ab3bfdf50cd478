"""Loading takes the model's own memory and a tensor more, also in another dtype than the files'.

`benchmarks/checkpoint_memory.py` measures the other operations, at 2 GB.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cogvlm_sft.checkpoint.load import expected_shapes, make_config
from cogvlm_sft.checkpoint.weights import Planned, write_weights

LOAD = """
import sys
from cogvlm_sft.checkpoint.load import load_model
def resident(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
model = load_model(sys.argv[1], dtype="float32")
print(resident("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_load_in_another_dtype(tmp_path: Path) -> None:
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "num_hidden_layers": 2}
    fields = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
              "num_attention_heads": 8, "vocab_size": 4000, "vision_config": vision}  # fmt: skip
    config = make_config(fields)
    tensors = [
        Planned(name, shape, torch.bfloat16, lambda shape=shape: torch.ones(shape))
        for name, shape in expected_shapes(config).items()
    ]
    shard = 10_000_000
    assert len(write_weights(tmp_path, tensors, shard_bytes=shard)) > 10
    config.save_pretrained(tmp_path)
    stays = 2 * sum(tensor.nbytes for tensor in tensors)  # fp32 from bf16
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) <= 1.2 * (stays + shard)
