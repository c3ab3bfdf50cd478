"""The five parameter groups of a CogVLM, their learning rates, and what decays.

Groups are a partition by the released parameter names: every parameter belongs to exactly one, and
one that belongs to none (or two) is an error, so that nothing trains or stays frozen by accident.
Names are searched after the wrappers of PEFT, torch.compile, FSDP and checkpointing are taken out.

Weight decay acts on matrices only: weights of linears (lm_head and LoRA factors among them) and
convolutions. Norms, biases, boi and eoi, the class and position embeddings and embed_tokens do not
decay; an embedding row would shrink at every step in which its token does not even occur.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cogvlm_sft.errors import CheckpointError

GROUPS = ("language", "visual_expert", "adapter", "vision_tower", "embeddings")

# Released names: facts of the checkpoint's index, e.g. model.layers.0.self_attn.vision_expert_dense
_PATTERNS = {
    "language": re.compile(
        r"\.(language_expert_(query_key_value|dense)|language_mlp)\."
        r"|(?<!transformer\.)\blayers\.\d+\.(input|post_attention)_layernorm\."
        r"|(?<!vision\.)\bmodel\.norm\.|^norm\."
    ),
    "visual_expert": re.compile(r"\.(vision_expert_(query_key_value|dense)|vision_mlp)\."),
    "adapter": re.compile(r"\bvision\.(linear_proj|conv)\.|\bvision\.(boi|eoi)\b"),
    "vision_tower": re.compile(r"\bvision\.(patch_embedding|transformer)\."),
    "embeddings": re.compile(r"\b(embed_tokens|lm_head)\."),
}
_WRAPPERS = re.compile(
    r"\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer|modules_to_save|"
    r"original_module)\."
)
_EMBEDDINGS = re.compile(r"\b(embed_tokens|position_embedding|cls_embedding|boi|eoi)\b")


@dataclass(frozen=True, slots=True)
class GroupSummary:
    """What the start-up table says about one group; counts are of scalars."""

    name: str
    parameters: int
    trainable: int
    learning_rate: float | None


def group_of(name: str) -> str:
    """The group of a parameter, by its (possibly wrapped) name.

    Raises:
        CheckpointError: the name fits no group, or more than one.
    """
    bare = _WRAPPERS.sub("", name)
    found = [group for group, pattern in _PATTERNS.items() if pattern.search(bare)]
    if len(found) != 1:
        what = f"groups {' and '.join(found)}" if found else "no parameter group"
        raise CheckpointError(
            f"parameter {name!r} belongs to {what}; every parameter of a CogVLM belongs to exactly "
            f"one of {', '.join(GROUPS)}. Is this a CogVLM model with its released names?"
        )
    return found[0]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay acts on a parameter: a matrix or kernel that is no embedding."""
    return len(shape_of(parameter)) >= 2 and not _EMBEDDINGS.search(name)


def set_trainable(
    model: nn.Module, groups: Iterable[str], *, only_factors: Collection[str] = ()
) -> None:
    """Let exactly these groups learn; all others get `requires_grad=False`.

    Args:
        model: a CogVLM, wrapped or not.
        groups: which learn.
        only_factors: those of them of which only LoRA's factors learn.
    """
    chosen = _known(groups)
    for name, parameter in model.named_parameters():
        group = group_of(name)
        learns = group in chosen and (group not in only_factors or ".lora_" in name)
        parameter.requires_grad_(learns)


def shape_of(parameter: torch.Tensor) -> tuple[int, ...]:
    """A parameter's shape as the model means it.

    ZeRO-3 leaves a vector of nothing where a part lies on another GPU, and bitsandbytes packs two
    4-bit weights into an element; both keep the true shape beside it.
    """
    packed = getattr(parameter, "quant_state", None)
    shape = getattr(parameter, "ds_shape", parameter.shape) if packed is None else packed.shape
    return tuple(shape)


def size_of(parameter: torch.Tensor) -> int:
    """Number of weights of a parameter, wherever they lie."""
    return math.prod(shape_of(parameter))


def parameter_groups(
    model: nn.Module, *, learning_rate: float, rates: Mapping[str, float], weight_decay: float
) -> list[dict[str, Any]]:
    """Optimizer groups: each parameter group once with and once without decay.

    Args:
        model: a CogVLM, wrapped or not; only parameters with `requires_grad` are taken.
        learning_rate: the recipe's rate.
        rates: multiple of it per parameter group; a group that is not named must be frozen.
        weight_decay: for the decaying part of each group.

    Returns:
        Mappings for a torch optimizer with `params`, `lr`, `weight_decay`, `group` and `name`
        ("visual_expert.decay"). The main group is first, since Trainer reports the rate of the
        first one as *the* learning rate: the largest of those that train at rate 1.

    Raises:
        CheckpointError: a trainable parameter is in no group, or in one that has no rate.
    """
    _known(rates)
    members: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        group = group_of(name)
        if not parameter.requires_grad:
            continue
        if group not in rates:
            raise CheckpointError(
                f"parameter {name!r} is trainable, but its group {group!r} has no rate "
                f"(rates are given for {', '.join(rates)}); freeze it or give it one"
            )
        members.setdefault((group, decays(name, parameter)), []).append(parameter)
    sizes = {
        group: sum(size_of(p) for key, part in members.items() if key[0] == group for p in part)
        for group in rates
    }
    order = sorted(GROUPS, key=lambda group: -sizes.get(group, 0) * (rates.get(group) == 1.0))
    return [
        {
            "params": members[group, decay],
            "lr": learning_rate * rates[group],
            "weight_decay": weight_decay if decay else 0.0,
            "group": group,
            "name": f"{group}.{'decay' if decay else 'no_decay'}",
        }
        for group in order
        for decay in (True, False)
        if (group, decay) in members
    ]


def summarize_groups(
    model: nn.Module, *, learning_rate: float, rates: Mapping[str, float]
) -> list[GroupSummary]:
    """Size, trainable size and rate of each of the five groups, in the order of `GROUPS`."""
    total = dict.fromkeys(GROUPS, 0)
    trainable = dict.fromkeys(GROUPS, 0)
    for name, parameter in model.named_parameters():
        group = group_of(name)
        total[group] += size_of(parameter)
        trainable[group] += size_of(parameter) if parameter.requires_grad else 0
    return [
        GroupSummary(
            group,
            total[group],
            trainable[group],
            learning_rate * rates[group] if trainable[group] else None,
        )
        for group in GROUPS
    ]


def group_table(summaries: Sequence[GroupSummary]) -> str:
    """The start-up table: one line per group, and the sums."""
    rows = [
        (
            row.name,
            f"{row.parameters:,}",
            f"{row.trainable:,}",
            "frozen" if row.learning_rate is None else f"{row.learning_rate:.3g}",
        )
        for row in summaries
    ]
    total = sum(row.parameters for row in summaries)
    trainable = sum(row.trainable for row in summaries)
    header = ("group", "parameters", "trainable", "rate")
    lines = [header, *rows, ("total", f"{total:,}", f"{trainable:,}", "")]
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    text = [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    rule = "-" * (sum(widths) + 6)
    return "\n".join([text[0], rule, *text[1:-1], rule, text[-1]])


def _known(groups: Iterable[str]) -> set[str]:
    chosen = set(groups)
    if unknown := chosen - set(GROUPS):
        raise CheckpointError(
            f"unknown parameter group(s) {', '.join(sorted(unknown))}; known: {', '.join(GROUPS)}"
        )
    return chosen
