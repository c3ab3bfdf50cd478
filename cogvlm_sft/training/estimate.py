"""What a recipe needs before the GPU time starts: memory by part, what fits, operations and hours.

Everything comes from shapes on the meta device, in seconds: nothing is loaded. Memory is that of
`memory.py`, for each way of spreading the work that can run the recipe; 4-bit weights are spread by
DDP only. Operations are those of `flops.py`, GPU-hours follow from a stated share of a stated peak.
On a CPU the sum was compared with the measured peak (`benchmarks/memory.py`, the table in
docs/memory.md); on a GPU it has not been measured.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cogvlm_sft.checkpoint.load import load_config, make_config
from cogvlm_sft.checkpoint.positions import with_image_size
from cogvlm_sft.errors import CheckpointError, RecipeError
from cogvlm_sft.model import CogVLMConfig, CogVLMForCausalLM
from cogvlm_sft.recipe import Recipe
from cogvlm_sft.training import memory
from cogvlm_sft.training.flops import Work, training_flops
from cogvlm_sft.tune.groups import GroupSummary, group_table

GIB = 2**30
_TEXT_ALLOWANCE = 512  # tokens of text behind the image where the recipe sets no max_length
# What the allocator holds of activations beyond what is asked for.
_SLACK = {"cuda": 1.06, "cpu": 1.02}
# The CUDA context, cuBLAS and the kernels' own; on a CPU, libraries' buffers.
_WORKSPACE_BYTES = {"cuda": 1.25 * GIB, "cpu": 0.01 * GIB}
# Released config.json of CogVLM2-Llama3, where it differs from CogVLM-17B's.
_COGVLM2 = {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_multi_query_heads": 8,
    "max_position_embeddings": 8192,
    "pad_token_id": 128002,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
    "vision_config": {"image_size": 1344, "num_positions": 9217},
}
_OVERLAP = (
    "activations: what they take beyond the gradients, which a step of one micro-batch makes while "
    "they go"
)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one device under one way of spreading the work.

    Attributes:
        name: "1 GPU", "CPU", "DDP", "FSDP2", "ZeRO-2" or "ZeRO-3".
        parts: part to bytes.
        largest_micro_batch: conversations of the assumed length that fit; 0 if none does.
        longest_text: tokens of text behind one picture that fit at micro-batch 1; 0 if none does.
    """

    name: str
    parts: Mapping[str, float]
    largest_micro_batch: int
    longest_text: int

    @property
    def total(self) -> float:
        """Sum of the parts in bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Estimate:
    """What `estimate` found; `table()` prints it.

    Attributes:
        source, model: the recipe, and where its model's shapes came from.
        groups: lines of the group table.
        plans: one for each way of spreading.
        gpus, nodes, gpu_memory_gib: as asked.
        tokens: length of a conversation that is assumed, and `image_tokens` of it.
        micro_batch_size, global_batch_size, iterations: the recipe's.
        step_flops: operations of one optimizer step, over all GPUs.
        mfu, peak_flops: as asked.
    """

    source: str
    model: str
    groups: tuple[GroupSummary, ...]
    plans: tuple[MemoryPlan, ...]
    gpus: int
    nodes: int
    gpu_memory_gib: float
    tokens: int
    image_tokens: int
    micro_batch_size: int
    global_batch_size: int
    iterations: int
    step_flops: float
    mfu: float
    peak_flops: float

    @property
    def gpu_hours(self) -> float:
        """Of the whole run, all GPUs added up."""
        return self.step_flops * self.iterations / (self.mfu * self.peak_flops) / 3600

    def table(self) -> str:
        """Parameters per group, memory by part with a column for each plan, and the work."""
        capacity = self.gpu_memory_gib * GIB
        rows = [("GiB per GPU", *(plan.name for plan in self.plans))]
        rows += [
            (part, *(f"{plan.parts[part] / GIB:,.2f}" for plan in self.plans))
            for part in self.plans[0].parts
        ]
        rows += [
            ("total", *(f"{plan.total / GIB:,.2f}" for plan in self.plans)),
            (
                f"fits {self.gpu_memory_gib:g} GiB",
                *("yes" if plan.total <= capacity else "no" for plan in self.plans),
            ),
            ("largest micro-batch", *(f"{plan.largest_micro_batch:,}" for plan in self.plans)),
            ("longest text, tokens", *(f"{plan.longest_text:,}" for plan in self.plans)),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        processes = self.gpus * self.nodes
        hours = self.gpu_hours
        overlap = self.micro_batch_size * processes >= self.global_batch_size
        return "\n".join(
            [
                f"{self.source}: {self.model}",
                "",
                group_table(self.groups),
                "",
                f"micro-batch {self.micro_batch_size}, {self.tokens} tokens a conversation "
                f"({self.image_tokens} of a picture), {processes} GPU(s)",
                *lines,
                *([_OVERLAP] if overlap else []),
                "",
                f"work: {self.step_flops / 1e12:,.1f} TFLOP a step of {self.global_batch_size} "
                f"such conversations, {self.step_flops * self.iterations:.2e} FLOP in "
                f"{self.iterations:,} steps",
                f"time: {hours:,.1f} GPU-hours, {hours / processes:,.1f} h on {processes} GPU(s), "
                f"at {self.mfu:.0%} of {self.peak_flops / 1e12:,.0f} TFLOP/s a GPU",
            ]
        )


def estimate(
    recipe: Recipe,
    gpus: int = 1,
    gpu_memory_gib: float = 80.0,
    device: str = "cuda",
    *,
    nodes: int = 1,
    mfu: float = 0.4,
    peak_tflops: float = 989.0,
) -> Estimate:
    """Estimate a recipe's memory per GPU and its work.

    Args:
        recipe: where its checkpoint folder is missing, the released CogVLM-17B at 490 px is taken,
            or CogVLM2 where the folder is named so (and said so). Conversations are taken to be
            `data.max_length` long, or a picture and 512 tokens of text: memory must hold the
            longest; the work is then an upper bound.
        gpus: of one machine.
        gpu_memory_gib: memory of one device.
        device: "cuda" or "cpu", for the workspace allowance.
        nodes: machines.
        mfu: share of the peak that is assumed, 0 to 1.
        peak_tflops: dense bf16 peak of one GPU in 1e12 operations a second; 989 is an H100 SXM.

    Raises:
        RecipeError: a number is not positive.
    """
    for name, value in (("gpus", gpus), ("nodes", nodes), ("gpu-memory", gpu_memory_gib)):
        if not 0 < value < math.inf:
            raise RecipeError(f"estimate: {name} is {value}; expected more than 0")
    if not 0 < mfu <= 1 or not 0 < peak_tflops < math.inf:
        raise RecipeError(
            f"estimate: mfu is {mfu} and peak-tflops {peak_tflops}; expected a share of 1 and more "
            "than 0"
        )
    config, model_name = model_config(recipe)
    with torch.device("meta"):
        model = CogVLMForCausalLM(config)
    found = memory.pieces(model, recipe)
    whole = memory.states(found, recipe)
    tokens = recipe.data.max_length or config.num_image_tokens + 1 + _TEXT_ALLOWANCE
    capacity, processes = gpu_memory_gib * GIB, gpus * nodes
    rows_at_once: float = recipe.train.micro_batch_size
    if recipe.data.share_images and recipe.data.token_budget:
        rows_at_once = recipe.data.token_budget / tokens  # a packed row of so many tokens

    def plan(name: str) -> MemoryPlan:
        held = memory.spread(name, whole, found, recipe, processes)
        workspace = _WORKSPACE_BYTES[device]
        room = capacity - sum(held.values()) - workspace

        def passing(length: int, rows: float) -> dict[str, float]:
            parts = memory.activations(config, recipe, length, rows)
            parts = {part: _SLACK[device] * size for part, size in parts.items()}
            if rows * processes >= recipe.train.global_batch_size:
                # One micro-batch a step: gradients take the place of activations as these go.
                parts["activations"] = max(0.0, parts["activations"] - held["gradients"])
            return parts

        shortest = config.num_image_tokens + 2
        longest = _largest(lambda text: sum(passing(shortest + text, 1).values()) <= room)
        return MemoryPlan(
            name,
            {
                **held,
                **passing(tokens, rows_at_once),
                "workspace": workspace,
            },
            _largest(lambda rows: sum(passing(tokens, rows).values()) <= room),
            min(longest, config.max_position_embeddings) if longest else 0,
        )

    names = ["CPU" if device == "cpu" else "1 GPU"]
    if processes > 1:
        names = ["DDP"] if recipe.model.quantize else ["DDP", "FSDP2", "ZeRO-2", "ZeRO-3"]
    full = {name for name, group in recipe.tune.groups().items() if group.mode == "full"}
    images = config.num_image_tokens if tokens > config.num_image_tokens else 0
    work = Work(
        tokens=tokens,
        squares=tokens**2,
        images=1 if images else 0,
        supervised=tokens - images,
    )
    return Estimate(
        source=recipe.source,
        model=model_name,
        groups=tuple(memory.group_summaries(found, recipe)),
        plans=tuple(plan(name) for name in names),
        gpus=gpus,
        nodes=nodes,
        gpu_memory_gib=gpu_memory_gib,
        tokens=tokens,
        image_tokens=images,
        micro_batch_size=recipe.train.micro_batch_size,
        global_batch_size=recipe.train.global_batch_size,
        iterations=recipe.train.iterations,
        step_flops=training_flops(config, full, work) * recipe.train.global_batch_size,
        mfu=mfu,
        peak_flops=peak_tflops * 1e12,
    )


def model_config(recipe: Recipe) -> tuple[CogVLMConfig, str]:
    """The recipe's model configuration, and in words where it came from."""
    if recipe.model.config is not None:
        return make_config(recipe.model.config), "model.config, from scratch"
    folder = recipe.model.checkpoint or Path()
    try:
        config, name = load_config(folder), str(folder)
    except CheckpointError:
        second = "cogvlm2" in folder.name.lower()
        config = CogVLMConfig(**_COGVLM2) if second else CogVLMConfig()
        size = recipe.model.image_size or config.vision_config.image_size
        name = f"{'CogVLM2-19B' if second else 'CogVLM-17B'} at {size} px"
        name += f" (assumed: {folder} cannot be read)"
    if recipe.model.image_size is not None:
        config = with_image_size(config, recipe.model.image_size)
    return config, name


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number from 1 up that fits, by doubling and halving; 0 if 1 does not."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while high < 2**20 and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
