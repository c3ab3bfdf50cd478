"""What `cogvlm-sft estimate` says: exact states, what fits, work; and a process measured."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cogvlm_sft import Recipe, RecipeError, load_recipe
from cogvlm_sft.cli import main
from cogvlm_sft.training.estimate import GIB, MemoryPlan, estimate

MakeRecipe = Callable[..., Recipe]
ROOT = Path(__file__).resolve().parents[2]
TOWER, TOTAL = 4_282_641_664, 17_639_685_376


def test_states_of_the_chat_recipe_are_exact() -> None:
    recipe = load_recipe("chat")
    found = estimate(recipe, gpus=8, gpu_memory_gib=80)
    trainable = TOTAL - TOWER
    ddp, fsdp, zero_2, zero = found.plans
    assert [plan.name for plan in found.plans] == ["DDP", "FSDP2", "ZeRO-2", "ZeRO-3"]
    # All weights in bf16, and an eighth of: fp32 masters, gradients, two moments.
    held = ("weights", "bf16 copies", "gradients", "optimizer")
    assert sum(zero_2.parts[part] for part in held) == 2 * TOTAL + 16 * trainable / 8
    assert ddp.parts["optimizer"] == 8 * trainable
    assert ddp.parts["weights"] == 4 * trainable + 2 * TOWER
    assert ddp.parts["buffers"] == ddp.parts["gradients"] == 4 * trainable
    # One layer whole: gathered twice in bf16, its gradients in bf16 and, to be reduced, in fp32.
    layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 4096
    assert fsdp.parts["buffers"] == (2 * 2 + 2 + 4) * layer
    for plan in (fsdp, zero):
        assert plan.parts["gradients"] == 4 * trainable / 8
        assert plan.total < 80 * GIB and plan.largest_micro_batch >= recipe.train.micro_batch_size
    assert ddp.largest_micro_batch == 0 and ddp.total > 80 * GIB and ddp.longest_text == 0
    table = found.table()
    for words in ("6,476,271,616", "FSDP2", "ZeRO-3", "largest micro-batch", "longest text"):
        assert words in table
    more = estimate(recipe, gpus=8, nodes=8, gpu_memory_gib=80)
    assert more.plans[1].parts["optimizer"] == 8 * trainable / 64
    assert more.gpu_hours == pytest.approx(found.gpu_hours), "hours are of all GPUs together"


def test_the_figures_of_recipes_are_the_estimates() -> None:
    """`41 GiB on 8 GPUs` in a header, and `243 GiB` on one device, are what the command prints."""
    found = []
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        head = path.read_text(encoding="utf-8").partition("\n\n")[0].replace("\n#", "")
        recipe = load_recipe(path.stem)
        for size, gpus in re.findall(r"(\d+) GiB on (\d+) GPUs", head):
            plans = {plan.name: plan for plan in estimate(recipe, gpus=int(gpus)).plans}
            found.append((path.stem, int(gpus), int(size), round(plans["FSDP2"].total / GIB)))
        for size in re.findall(r"on one device would take (\d+) GiB", head):
            found.append((path.stem, 1, int(size), round(estimate(recipe).plans[0].total / GIB)))
    assert {name for name, *_ in found} == {"chat", "chat_cogvlm2"} and len(found) == 4
    assert [row for row in found if row[2] != row[3]] == []


PARTS = (
    "weights", "bf16 copies", "gradients", "optimizer", "buffers", "activations", "logits",
    "workspace",
)  # fmt: skip
QLORA_ROWS = {
    "`chat_qlora`": [],
    "the tower in 4 bits too": [
        "model.quantize={groups: [language, visual_expert, vision_tower]}",
    ],
    "GLU frozen": ["tune.adapter={mode: frozen}"],
    "`optimizer: adamw`": ["train.optimizer=adamw"],
    "`variant: dora`": ["tune.language.variant=dora", "tune.visual_expert.variant=dora"],
    "micro-batch 4": ["train.micro_batch_size=4"],
    "micro-batch 8": ["train.micro_batch_size=8"],
    "no gradient checkpointing": ["train.gradient_checkpointing=false"],
}
ONE, KEPT = ["train.micro_batch_size=1"], ["train.gradient_checkpointing=false"]
ROWS = [
    ("`chat_lora`, micro-batch 1, 512 text", "1 GPU", "chat_lora", [*ONE, "data.max_length=1740"]),
    ("`chat_lora`, micro-batch 4", "1 GPU", "chat_lora", []),
    (
        "without gradient checkpointing",
        "1 GPU",
        "chat_lora",
        ["train.gradient_checkpointing=false"],
    ),
    ("`chat`, micro-batch 1", "1 GPU", "chat", ONE),
    ("`chat`, micro-batch 10", "8, DDP", "chat", []),
    ("", "8, FSDP2", "chat", []),
    ("", "8, ZeRO-2", "chat", []),
    ("", "8, ZeRO-3", "chat", []),
    ("", "64, FSDP2", "chat", []),
    ("`chat_v1_1`", "8, FSDP2", "chat_v1_1", []),
]


def test_the_tables_of_the_memory_page_are_the_estimates() -> None:
    page = re.sub(" +", " ", (ROOT / "docs" / "memory.md").read_text(encoding="utf-8"))

    def line(head: str, plan: MemoryPlan, parts: tuple[str, ...]) -> str:
        sizes = [f"{plan.parts[part] / GIB:.1f}" if plan.parts[part] else "" for part in parts]
        cells = " | ".join([head, *sizes, f"**{plan.total / GIB:.1f}**"])
        return re.sub(" +", " ", f"| {cells} |")

    wanted = []
    for head, changes in QLORA_ROWS.items():
        (plan,) = estimate(load_recipe("chat_qlora", changes), gpu_memory_gib=24).plans
        wanted.append(line(head, plan, tuple(part for part in PARTS if part != "buffers")))
    for head, way, name, changes in ROWS:
        count, _, kind = way.partition(", ")
        found = estimate(load_recipe(name, changes), gpus=int(count.split()[0]))
        plan = next(plan for plan in found.plans if plan.name == (kind or "1 GPU"))
        wanted.append(line(f"{head} | {way}", plan, PARTS))
    assert [row for row in wanted if row not in page] == []


def test_work_is_operations_over_the_stated_rate() -> None:
    found = estimate(load_recipe("chat"), gpus=8, mfu=0.5, peak_tflops=100)
    seconds = found.step_flops * 8000 / (0.5 * 100e12)
    assert found.gpu_hours == pytest.approx(seconds / 3600)
    # About 90 TFLOP for 2,048 tokens (the tower runs forward only), 640 conversations a step.
    assert 70e12 < found.step_flops / 640 < 110e12


def test_qlora_on_a_24_gb_card() -> None:
    recipe = load_recipe("chat_qlora")
    found = estimate(recipe, gpu_memory_gib=24)
    (plan,) = found.plans
    quantized = 2 * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    glu, learns = 142_622_720, plan.parts["gradients"] / 4
    nf4 = quantized * (0.5 + 1 / 64 + 4 / (64 * 256))
    assert plan.parts["weights"] == pytest.approx(nf4 + 2 * (TOTAL - quantized - glu) + 4 * learns)
    ranks = {"language": 16, "visual_expert": 32}
    shapes = [(4096, 12288), (4096, 4096), (4096, 11008), (4096, 11008), (11008, 4096)]
    factors = sum(32 * rank * sum(a + b for a, b in shapes) for rank in ranks.values())
    assert learns == factors + glu
    # bitsandbytes: two bytes an entry and two fp32 scales a block of 256.
    assert plan.parts["optimizer"] == pytest.approx(learns * (2 + 8 / 256))
    assert found.tokens - found.image_tokens >= 512
    assert plan.total <= 22 * GIB and plan.longest_text >= 512
    assert estimate(recipe, gpus=4, gpu_memory_gib=24).plans[0].name == "DDP"


def test_lora_in_bf16_at_512_tokens_of_text() -> None:
    recipe = load_recipe("chat_lora", ["train.micro_batch_size=1", "data.max_length=1740"])
    assert estimate(recipe).plans[0].total <= 48 * GIB


def test_more_rows_and_longer_text_take_more() -> None:
    def activations(**changes: int) -> float:
        overrides = [f"{key.replace('__', '.')}={value}" for key, value in changes.items()]
        return estimate(load_recipe("chat", overrides)).plans[0].parts["activations"]

    one = activations(train__micro_batch_size=1)
    assert activations(train__micro_batch_size=4) == pytest.approx(4 * one)
    assert activations(train__micro_batch_size=1, data__max_length=1500) < one
    kept = load_recipe("chat", ["train.gradient_checkpointing=false"])
    assert estimate(kept).plans[0].parts["activations"] > 5 * 10 * one


def test_what_fits_is_the_largest_that_does() -> None:
    recipe = load_recipe("chat_qlora")
    plan = estimate(recipe, gpu_memory_gib=24).plans[0]
    for rows in (plan.largest_micro_batch, plan.largest_micro_batch + 1):
        sized = load_recipe(
            "chat_qlora",
            [f"train.micro_batch_size={rows}", f"train.global_batch_size={9 * rows}"],
        )
        assert (estimate(sized).plans[0].total <= 24 * GIB) == (rows == plan.largest_micro_batch)
    one = estimate(recipe, gpu_memory_gib=plan.total / GIB + 1e-6).plans[0]
    assert one.largest_micro_batch == 1
    assert one.longest_text in (511, 512, 513), "as long as the recipe's conversations"
    assert estimate(recipe, gpu_memory_gib=10).plans[0].longest_text == 0


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    started = time.process_time()
    assert main(["estimate", "chat", "--gpus", "8", "--nodes", "4", "--gpu-memory", "80"]) == 0
    assert time.process_time() - started < 60, "seconds, from the meta device"
    printed = capsys.readouterr().out
    assert "32 GPU(s)" in printed and "GPU-hours" in printed and "at 40% of 989" in printed
    for wrong in (["--gpus", "0"], ["--mfu", "2"], ["--gpu-memory", "-1"]):
        assert main(["estimate", "chat", *wrong]) == 2
        assert "expected" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("case", ["chat", "lora"])
def test_within_a_tenth_of_a_measured_process(case: str) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--case", case]
    printed = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    row = json.loads(printed.splitlines()[-1])
    assert 0.9 < row["ratio"] < 1.1, row


def test_senseless_numbers_are_refused() -> None:
    with pytest.raises(RecipeError, match="gpu-memory is nan; expected more than 0"):
        estimate(load_recipe("chat"), gpus=1, gpu_memory_gib=float("nan"))
    with pytest.raises(RecipeError, match="nodes is 0; expected more than 0"):
        estimate(load_recipe("chat"), nodes=0)
