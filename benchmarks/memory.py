"""The memory estimate against what a process really takes, on the CPU.

    python -m benchmarks.memory              every case, a table
    python -m benchmarks.memory --case lora  one case, a JSON object

Each case is a recipe on a CogVLM of some ten million parameters (fp32, 224 px, a picture and 254
tokens of text a row). It runs three training steps in a process of its own; measured is the highest
resident size (without pages of files, which the system may drop) less that before the model exists.
The estimate is that of `cogvlm-sft estimate` for the same recipe.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONFIG = {
    "vocab_size": 2048,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": 1024,
    "vision_config": {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_heads": 4,
        "num_hidden_layers": 6,
        "image_size": 224,
        "patch_size": 14,
        "num_positions": 257,
    },
}
TOKENS = 513
FROZEN = {"mode": "frozen"}
LORA = {"mode": "lora", "rank": 16}
CHAT = {"vision_tower": FROZEN}
FACTORS = {"language": LORA, "visual_expert": LORA, "vision_tower": FROZEN, "embeddings": FROZEN}
# name -> tune, quantize, changes of `train`
CASES: dict[str, tuple[dict[str, Any], str | None, dict[str, Any]]] = {
    "chat": (CHAT, None, {}),
    "chat, recomputed": (CHAT, None, {"gradient_checkpointing": True, "micro_batch_size": 8}),
    "chat, two micro-batches": (CHAT, None, {"micro_batch_size": 2, "global_batch_size": 4}),
    "everything": ({}, None, {"micro_batch_size": 2}),
    "adapter only": (
        {"language": FROZEN, "visual_expert": FROZEN, "embeddings": FROZEN, "vision_tower": FROZEN},
        None,
        {},
    ),
    "lora": (FACTORS, None, {}),
    "lora, dropout": (
        {**FACTORS, "visual_expert": {**LORA, "dropout": 0.1}, "language": FROZEN},
        None,
        {},
    ),
    "qlora": (FACTORS, "nf4", {"optimizer": "paged_adamw_8bit"}),
    "qlora, recomputed": (FACTORS, "nf4", {"gradient_checkpointing": True, "micro_batch_size": 8}),
}


def case_recipe(name: str, checkpoint: str) -> Any:
    """The recipe of a case; only its model, tune and train sections are used."""
    from cogvlm_sft.recipe import recipe_from_dict

    tune, quantize, train = CASES[name]
    return recipe_from_dict(
        {
            "model": {"checkpoint": checkpoint, "dtype": "float32", "quantize": quantize},
            "data": {"train": [{"path": "none"}], "image_root": "none", "max_length": TOKENS},
            "tune": tune,
            "train": {
                "output": "none",
                "iterations": 3,
                "global_batch_size": train.get("micro_batch_size", 4),
                "micro_batch_size": 4,
                "learning_rate": 1e-4,
                **train,
            },
        }
    )


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process: resident now, at most (`VmHWM`), or of one kind."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def measure(name: str) -> dict[str, Any]:
    """Runs a case in this process."""
    import bitsandbytes
    import peft  # noqa: F401 - imports shall not count
    import torch
    import transformers.integrations.bitsandbytes
    import transformers.quantizers.auto  # noqa: F401

    from cogvlm_sft.checkpoint.load import build_model, load_model
    from cogvlm_sft.training.estimate import estimate
    from cogvlm_sft.training.optimization import hold_trainable_in_fp32
    from cogvlm_sft.tune.adapters import apply_tuning
    from cogvlm_sft.tune.groups import parameter_groups

    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        build_model(CONFIG).save_pretrained(folder)
        recipe = case_recipe(name, folder)
        plan = estimate(recipe, device="cpu").plans[0]
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
        before = resident("RssAnon")
        quantize = recipe.model.quantize.groups if recipe.model.quantize else ()
        model = load_model(folder, quantize=quantize)
        apply_tuning(model, recipe.tune)
        hold_trainable_in_fp32(model)
        # Out of the mapped file, whose pages the system may drop.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    if recipe.train.gradient_checkpointing:
        model.activation_checkpointing_enable()
    groups = parameter_groups(
        model, learning_rate=1e-4, rates=recipe.tune.trainable(), weight_decay=0.0
    )
    eight = recipe.train.optimizer == "paged_adamw_8bit"
    optimizer = bitsandbytes.optim.AdamW8bit(groups) if eight else torch.optim.AdamW(groups)
    model.train()
    rows = recipe.train.micro_batch_size
    ids = torch.randint(3, CONFIG["vocab_size"], (rows, TOKENS))
    types = torch.zeros_like(ids)
    types[:, 1:259] = 1
    batch = {
        "input_ids": ids,
        "token_type_ids": types,
        "attention_mask": torch.ones_like(ids),
        "labels": ids.masked_fill(types == 1, -100),
        "pixel_values": torch.randn(rows, 3, 224, 224),
    }
    for _ in range(3):
        for _ in range(recipe.accumulation_steps(1)):
            model(**batch, use_cache=False, supervised_only=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    measured = resident("VmHWM") - resident("RssFile") - before
    return {
        "case": name,
        "parts": dict(plan.parts),
        "estimated": plan.total,
        "measured": measured,
        "ratio": plan.total / measured,
    }


def main() -> int:
    """Prints the table, or one case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES)
    parsed = parser.parse_args()
    if parsed.case:
        print(json.dumps(measure(parsed.case)))
        return 0
    from tqdm import tqdm

    from benchmarks.measure import report
    from benchmarks.models import RESULTS

    rows = []
    for name in tqdm(CASES, unit="case"):
        command = [sys.executable, "-m", "benchmarks.memory", "--case", name]
        # glibc keeps freed blocks below 32 MiB for itself unless told otherwise.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        printed = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout
        found = json.loads(printed.splitlines()[-1])
        rows.append(
            {"case": name, "estimate MiB": found["estimated"] / 2**20,
             "measured MiB": found["measured"] / 2**20, "ratio": found["ratio"]}
        )  # fmt: skip
    report("memory", rows, RESULTS)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
