"""Peak memory of reading and writing checkpoints, against what must stay.

    python benchmarks/checkpoint_memory.py            2.3 GB in shards of 300 MB, about a minute
    python benchmarks/checkpoint_memory.py --small    a tenth of the size, figures without verdict

A CogVLM of random weights is written in many shards (and as a SAT checkpoint), about six layers in
each as in the released files, and each operation runs in a process of its own. Its peak resident
size (Linux's VmHWM, so mapped pages count), less that of the same process with everything imported,
must not exceed what stays in memory (the model, for loading; nothing, for exporting, converting and
merging) plus one shard, plus 20 %.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from cogvlm_sft.checkpoint.load import expected_shapes, load_config, make_config
from cogvlm_sft.checkpoint.weights import Planned, write_weights
from cogvlm_sft.demo.tokenizer import train_tokenizer

MB = 1_000_000
_WORKER = """
import sys
from cogvlm_sft.checkpoint import export, load, merge, sat
def resident(kind):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))
folder, out, tokenizer = sys.argv[2:]
open("/proc/self/clear_refs", "w").write("5")  # the highest so far is forgotten
before = resident("VmRSS")
if sys.argv[1] == "load":
    model = load.load_model(folder, dtype="bfloat16")
elif sys.argv[1] == "load as fp32":
    model = load.load_model(folder, dtype="float32")
elif sys.argv[1] == "export":
    export.export_checkpoint(folder, out, tokenizer=tokenizer, shard_bytes=300_000_000)
elif sys.argv[1] == "merge":
    merge.merge(folder, out)
else:
    sat.convert_sat(folder, out)
print(resident("VmHWM") - before)
"""


def main() -> int:
    """Measures every operation; 1 if one exceeds its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tenth of the size")
    small = parser.parse_args().small
    layers, shard = (4, 30 * MB) if small else (44, 300 * MB)
    fields = {
        "vocab_size": 4000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "vision_config": {
            "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "num_hidden_layers": 2,
            "image_size": 224, "num_positions": 257,
        },
    }  # fmt: skip
    failed = False
    with tempfile.TemporaryDirectory() as root:
        folder, sat = Path(root, "checkpoint"), Path(root, "sat")
        tokenizer = train_tokenizer(["Question: 7 Answer: 7"] * 20, Path(root, "tokenizer"), 320)
        size = write_checkpoint(folder, fields, shard)
        write_sat(folder, sat)
        adapter = write_adapter(folder, Path(root, "adapter"))
        count = len(list(folder.glob("model-*")))
        print(f"{size / 1e9:.2f} GB in {count} shards of {shard / MB:.0f} MB")
        for what, source, stays in (
            ("load", folder, size),
            ("load as fp32", folder, 2 * size),
            ("export", folder, 0),
            ("convert", sat, 0),
            ("merge", adapter, 0),
        ):
            out = Path(root, f"out {what}")
            arguments = [what, str(source), str(out), str(tokenizer)]
            done = subprocess.run(
                [sys.executable, "-c", _WORKER, *arguments], capture_output=True, text=True
            )
            if done.returncode:
                print(done.stderr)
                return 1
            peak = int(done.stdout)
            bound = 1.2 * stays + shard * 1.2
            # What does not grow with the checkpoint (tokenizers, kernels) is beyond a small bound.
            exceeded = peak > bound and not small
            failed |= exceeded
            print(
                f"{what:<13} peak {peak / MB:6.0f} MB, of which stays {stays / MB:6.0f} MB, "
                f"bound {bound / MB:6.0f} MB{'  EXCEEDED' if exceeded else ''}"
            )
    return int(failed)


def write_checkpoint(folder: Path, fields: dict, shard: int) -> int:
    """Random bf16 weights in the released layout; returns their bytes."""
    folder.mkdir()
    config = make_config(fields)
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)

    tensors = [
        Planned(name, shape, torch.bfloat16, lambda shape=shape: draw(shape))
        for name, shape in expected_shapes(config).items()
    ]
    write_weights(folder, tensors, shard_bytes=shard)
    config.save_pretrained(folder)
    return sum(tensor.nbytes for tensor in tensors)


def write_sat(folder: Path, out: Path) -> None:
    """The same weights as one SAT file, under SAT's names."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from tests.checkpoint.conftest import tensors_of
    from tests.checkpoint.test_sat import sat_name

    out.mkdir()
    state = {
        sat_name(name): tensor
        for name, tensor in tensors_of(folder).items()
        if not name.endswith("inv_freq")
    }
    torch.save({"module": state}, out / "mp_rank_00_model_states.pt")
    described = {"num_attention_heads": 8, "eva_args": {"num_attention_heads": 4}}
    (out / "model_config.json").write_text(json.dumps(described))


def write_adapter(base: Path, out: Path) -> Path:
    """A LoRA adapter of rank 8 on both experts' output projections."""
    out.mkdir()
    factors = {}
    for name, shape in expected_shapes(load_config(base)).items():
        if name.endswith("_expert_dense.weight"):
            start = f"base_model.model.{name.removesuffix('weight')}"
            factors[f"{start}lora_A.weight"] = torch.randn(8, shape[1]) * 0.01
            factors[f"{start}lora_B.weight"] = torch.randn(shape[0], 8) * 0.01
    save_file(factors, out / "adapter_model.safetensors")
    LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=["language_expert_dense", "vision_expert_dense"],
        base_model_name_or_path=str(base),
    ).save_pretrained(out)
    return out


if __name__ == "__main__":
    raise SystemExit(main())
