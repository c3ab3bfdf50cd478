"""Memory that a recipe needs, by part, from the meta device: nothing is loaded or allocated.

Weights, gradients and optimizer state are exact counts. Activations are a model of what autograd
keeps: per token and decoder layer twelve hidden-wide and four MLP-wide tensors (norm inputs, QKV
before and after RoPE, attention output, gate, up, their product), or only the layer's input with
gradient checkpointing plus the one layer that is being recomputed; the gradients of one layer; a
tower that learns adds its own. Scores of attention are not kept (sdpa and flash do not build them;
with `eager` they are added). Workspace is a flat allowance. On a CPU the sum was within 10 % of the
measured peak (models of 29M parameters, micro-batch 4 and 16, with and without checkpointing); on
GPUs it has not been measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cogvlm_sft.checkpoint.load import load_config, make_config
from cogvlm_sft.checkpoint.positions import with_image_size
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.model import CogVLMConfig, CogVLMForCausalLM
from cogvlm_sft.recipe import Recipe
from cogvlm_sft.tune.groups import (
    GroupSummary,
    group_of,
    group_table,
    set_trainable,
    summarize_groups,
)

GIB = 2**30
_MASTER_BYTES = 4  # fp32 weights of what learns
_GRADIENT_BYTES = 4
_ADAM_BYTES = 8  # two fp32 moments
_TEXT_ALLOWANCE = 512  # tokens of text behind the image where the recipe sets no max_length
_SLACK = 1.1  # what the allocator holds beyond what is asked for
_WORKSPACE_BYTES = {"cuda": 1.5 * GIB, "cpu": 0.5 * GIB}


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one device under one way of spreading the work."""

    name: str
    parts: Mapping[str, float]
    largest_micro_batch: int

    @property
    def total(self) -> float:
        """Sum of the parts in bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Estimate:
    """What `estimate` found; `table()` prints it."""

    source: str
    model: str
    groups: tuple[GroupSummary, ...]
    plans: tuple[MemoryPlan, ...]
    gpus: int
    gpu_memory_gib: float
    tokens: int
    micro_batch_size: int

    def table(self) -> str:
        """Parameters per group, then memory by part with a column for each plan."""
        rows = [("GiB per GPU", *(plan.name for plan in self.plans))]
        rows += [
            (part, *(f"{plan.parts[part] / GIB:,.2f}" for plan in self.plans))
            for part in self.plans[0].parts
        ]
        rows.append(("total", *(f"{plan.total / GIB:,.2f}" for plan in self.plans)))
        capacity = self.gpu_memory_gib * GIB
        rows.append(
            (
                f"fits {self.gpu_memory_gib:g} GiB",
                *("yes" if plan.total <= capacity else "no" for plan in self.plans),
            )
        )
        rows.append(("largest micro-batch", *(str(p.largest_micro_batch) for p in self.plans)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if column == 0 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join(
            [
                f"{self.source}: {self.model}",
                "",
                group_table(self.groups),
                "",
                f"micro-batch {self.micro_batch_size}, {self.tokens} tokens a conversation, "
                f"{self.gpus} GPU(s)",
                *lines,
            ]
        )


def estimate(
    recipe: Recipe, gpus: int = 1, gpu_memory_gib: float = 80.0, device: str = "cuda"
) -> Estimate:
    """Estimate a recipe's memory per GPU.

    Args:
        recipe: where its checkpoint folder is missing, the released CogVLM-17B at 490 px is taken
            (and said so).
        gpus: processes that train together; with one there is one plan, else DDP and FSDP2.
        gpu_memory_gib: memory of one device.
        device: "cuda" or "cpu", for the workspace allowance.
    """
    config, model_name = model_config(recipe)
    rates = recipe.tune.trainable()
    with torch.device("meta"):
        model = CogVLMForCausalLM(config)
    set_trainable(model, rates)
    groups = summarize_groups(model, learning_rate=recipe.train.learning_rate, rates=rates)
    states = _states(model, recipe)
    tokens = recipe.data.max_length or config.num_image_tokens + 1 + _TEXT_ALLOWANCE
    activations = _activations(config, recipe, tokens)
    names = ["1 GPU"] if gpus == 1 else ["DDP", "FSDP2"]
    if device == "cpu":
        names = [name.replace("1 GPU", "CPU") for name in names]
    plans = [
        _plan(
            name,
            states if name != "FSDP2" else _sharded(states, model, recipe, gpus),
            activations,
            recipe.train.micro_batch_size,
            _WORKSPACE_BYTES[device],
            gpu_memory_gib * GIB,
        )
        for name in names
    ]
    return Estimate(
        source=recipe.source,
        model=model_name,
        groups=tuple(groups),
        plans=tuple(plans),
        gpus=gpus,
        gpu_memory_gib=gpu_memory_gib,
        tokens=tokens,
        micro_batch_size=recipe.train.micro_batch_size,
    )


def model_config(recipe: Recipe) -> tuple[CogVLMConfig, str]:
    """The recipe's model configuration, and in words where it came from."""
    if recipe.model.config is not None:
        return make_config(recipe.model.config), "model.config, from scratch"
    folder = recipe.model.checkpoint or Path()
    try:
        config, name = load_config(folder), str(folder)
    except CheckpointError:
        size = recipe.model.image_size or 490
        config, name = CogVLMConfig(), f"CogVLM-17B at {size} px (assumed: {folder} cannot be read)"
    if recipe.model.image_size is not None:
        config = with_image_size(config, recipe.model.image_size)
    return config, name


def _states(model: CogVLMForCausalLM, recipe: Recipe) -> dict[str, float]:
    """Bytes of what stays for the whole run."""
    held = 2 if recipe.model.dtype == "bfloat16" else 4
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    # Autocast keeps a bf16 copy of every fp32 matrix from forward to backward.
    copies = sum(p.numel() for p in model.parameters() if p.requires_grad and p.ndim >= 2)
    return {
        "weights": float(frozen * held + trainable * _MASTER_BYTES),
        "bf16 copies": float(copies * 2 if held == 2 else 0),
        "gradients": float(trainable * _GRADIENT_BYTES),
        "optimizer": float(trainable * _ADAM_BYTES),
    }


def _sharded(
    states: Mapping[str, float], model: CogVLMForCausalLM, recipe: Recipe, gpus: int
) -> dict[str, float]:
    """The states spread over GPUs; two gathered units (one running, one coming) take the copies."""
    held = 2 if recipe.model.dtype == "bfloat16" else 4
    units: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        layer = name.split(".layers.")
        unit = f"{layer[0]}.{layer[1].split('.')[0]}" if len(layer) > 1 else group_of(name)
        units[unit] = units.get(unit, 0) + parameter.numel()
    sharded = {part: size / gpus for part, size in states.items()}
    sharded["bf16 copies"] = 2.0 * max(units.values()) * held
    return sharded


def _activations(config: CogVLMConfig, recipe: Recipe, tokens: int) -> dict[str, float]:
    """Bytes of one conversation between forward and backward."""
    width = 2 if recipe.model.dtype == "bfloat16" else 4
    hidden, vision = config.hidden_size, config.vision_config
    layer = tokens * (12 * hidden + 4 * config.intermediate_size) * width
    if recipe.model.attention == "eager":
        layer += 3 * config.num_attention_heads * tokens**2 * width
    layers = config.num_hidden_layers
    if recipe.train.gradient_checkpointing == "mlp":
        # Attention's norm input, QKV and output, and the residual stream, in every layer.
        kept = layers * tokens * 8 * hidden * width + layer
    elif recipe.train.gradient_checkpointing:
        # Between layers the residual stream is kept, in fp32 under autocast too.
        kept = layers * tokens * hidden * 4 + layer
    else:
        kept = layers * layer
    kept += layer  # the gradients of the layer that runs backward
    patches = vision.num_positions
    block = patches * (9 * vision.hidden_size + 2 * vision.intermediate_size) * width
    adapter = patches * (3 * hidden + 4 * config.intermediate_size) * width
    if "vision_tower" in recipe.tune.trainable():
        through = vision.num_hidden_layers * patches * vision.hidden_size * 4 + block
        tower = (
            through
            if recipe.train.gradient_checkpointing is True
            else vision.num_hidden_layers * block
        )
    else:
        tower = block  # one block at a time, nothing kept
    supervised = max(1, tokens - config.num_image_tokens)
    logits = supervised * config.vocab_size * (width + 4 + 4)
    return {"activations": _SLACK * (kept + tower + adapter), "logits": float(logits)}


def _plan(
    name: str,
    states: Mapping[str, float],
    activations: Mapping[str, float],
    micro_batch: int,
    workspace: float,
    capacity: float,
) -> MemoryPlan:
    per_conversation = sum(activations.values())
    room = capacity - sum(states.values()) - workspace
    parts = {
        **states,
        **{part: size * micro_batch for part, size in activations.items()},
        "workspace": workspace,
    }
    return MemoryPlan(name, parts, max(0, int(room // per_conversation)))
