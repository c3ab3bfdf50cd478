"""LoRA on parameter groups: which linears, how they are wrapped, and the files of an adapter.

PEFT does the wrapping, in place: the model stays a `CogVLMForCausalLM` whose chosen linears became
PEFT layers. Targets are whole module names by group, never substrings, and are counted afterwards.
An adapter folder holds everything that was trained in one file: the factors under PEFT's names, and
what was trained in full (the GLU, boi, eoi) under its own name, so that plain
`PeftModel.from_pretrained` loads both; `modules_to_save` would copy each module and cannot name a
bare parameter. PiSSA changes the base, so its adapter is written as the difference from its start,
of twice the rank (arXiv 2404.02948), which fits the released base.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import DUMMY_TARGET_MODULES
from safetensors.torch import load_file, save_file
from torch import nn

from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.model import CogVLMForCausalLM
from cogvlm_sft.recipe import GroupTuning, TuneSection
from cogvlm_sft.tune.groups import set_trainable
from cogvlm_sft.tune.naming import (
    ADAPTER_WEIGHTS,
    IMAGE_SIZE_NOTE,
    LINEARS,
    PREFIX,
    QUANTIZED_NOTE,
    linears_of,
)

_NAME = "default"
_PISSA = "pissa_niter_16"  # randomised SVD; the exact one takes minutes a matrix at full size


def apply_tuning(model: CogVLMForCausalLM, tune: TuneSection) -> None:
    """Wrap the linears of `lora` groups, and let exactly what the recipe says learn.

    Args:
        model: loaded, plain or with 4-bit linears; changed in place.
        tune: the recipe's section.

    Raises:
        CheckpointError: the model's linears are not those of a CogVLM.
    """
    groups = tune.lora()
    if groups:
        model.add_adapter(lora_config(tune), _NAME)
        wanted = {name: group for group in groups for name in linears_of(model, group)}
        found = {name for name, _ in _layers(model)}
        if found != wanted.keys() or set(wanted.values()) != groups.keys():
            raise CheckpointError(
                f"LoRA wraps {len(found)} linears, expected the {len(wanted)} of "
                f"{', '.join(groups)}; is this a CogVLM with its released module names?"
            )
        for name, layer in _layers(model):
            group = groups[wanted[name]]
            # PEFT's configuration knows one dropout for all linears.
            dropout = nn.Dropout(group.dropout) if group.dropout else nn.Identity()
            layer.lora_dropout[_NAME] = dropout
            if group.variant == "pissa":
                layer.pissa_init(_NAME, _PISSA)
                layer.pissa_start = tuple(part.detach().clone() for part in _factors(layer))
    elif getattr(model, "is_loaded_in_4bit", False):
        # transformers refuses to train a 4-bit model unless it is told of an adapter; here the
        # groups that are not quantised learn in full.
        model._hf_peft_config_loaded = True
    set_trainable(model, tune.trainable(), only_factors=groups)


def lora_config(tune: TuneSection, *, base: str | None = None) -> LoraConfig:
    """PEFT's configuration of a recipe's adapter: what its `adapter_config.json` says.

    Args:
        tune: the recipe's section; without a `lora` group the configuration wraps nothing.
        base: path of the base checkpoint, for whoever loads the adapter.
    """
    groups = tune.lora()
    if not groups:
        return LoraConfig(target_modules=DUMMY_TARGET_MODULES, base_model_name_or_path=base)
    first = next(iter(groups.values()))
    rslora = all(group.variant == "rslora" for group in groups.values())
    return LoraConfig(
        base_model_name_or_path=base,
        target_modules="|".join(f"({LINEARS[name]})" for name in groups),
        r=_rank(first),
        lora_alpha=_alpha(first, rslora),
        rank_pattern={LINEARS[name]: _rank(group) for name, group in groups.items()},
        alpha_pattern={LINEARS[name]: _alpha(group, rslora) for name, group in groups.items()},
        lora_dropout=first.dropout or 0.0,
        use_rslora=rslora,
        use_dora=first.variant == "dora",
    )


def _rank(group: GroupTuning) -> int:
    assert group.rank is not None, "the recipe fills it in for mode lora"
    return group.rank


def _alpha(group: GroupTuning, rslora: bool) -> float:
    """PEFT has one rsLoRA switch; beside other variants its scale goes into alpha."""
    assert group.alpha is not None, "the recipe fills it in for mode lora"
    fold = group.variant == "rslora" and not rslora
    return group.alpha * math.sqrt(_rank(group)) if fold else group.alpha


def adapter_state(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """What was trained, under the names of an adapter file.

    Args:
        model: a model after `apply_tuning`.
        state_dict: gathered weights of a sharded model, in place of the model's own.
    """
    starts = {name: layer.pissa_start for name, layer in _layers(model) if _is_pissa(layer)}
    state = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        tensor = parameter.detach() if state_dict is None else state_dict[name]
        module, factor, _ = name.partition(".lora_")
        if factor and module in starts:
            start = starts[module]
            if name.startswith(f"{module}.lora_A"):
                tensor = torch.cat((tensor, start[0].to(tensor)))
            else:
                tensor = torch.cat((tensor, -start[1].to(tensor)), dim=1)
        state[PREFIX + name.replace(f".{_NAME}", "")] = tensor.cpu().contiguous()
    return state


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """Writes the adapter of a run; `load_adapter` reads it back.

    Attributes:
        tune: the recipe's section.
        base: path of the checkpoint that the adapter belongs to.
        quantized: groups that are held in 4 bits meanwhile, and the dtype they are read in.
        image_size: pixels a side, where it is not the base's.
    """

    tune: TuneSection
    base: str
    quantized: tuple[Sequence[str], str] | None = None
    image_size: int | None = None

    def save(
        self,
        model: nn.Module,
        folder: Path,
        state_dict: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors` into an existing folder.

        Args:
            model: a model after `apply_tuning`.
            folder: target.
            state_dict: gathered weights of a sharded model, in place of the model's own.
        """
        config = lora_config(self.tune, base=self.base)
        for name, group in self.tune.lora().items():
            if group.variant == "pissa":  # two pairs of factors side by side, the scale as before
                config.rank_pattern[LINEARS[name]] = 2 * _rank(group)
                config.alpha_pattern[LINEARS[name]] = 2 * _alpha(group, False)
        config.inference_mode = True
        config.save_pretrained(str(folder))
        state = adapter_state(model, state_dict)
        notes = {"format": "pt"}
        if self.quantized is not None:
            groups, dtype = self.quantized
            notes[QUANTIZED_NOTE] = json.dumps({"groups": list(groups), "dtype": dtype})
        if self.image_size is not None:
            notes[IMAGE_SIZE_NOTE] = json.dumps(self.image_size)
        save_file(state, folder / ADAPTER_WEIGHTS, metadata=notes)


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Copy an adapter's tensors into a model after `apply_tuning`, every one accounted for.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape.
    """
    stored = load_file(folder / ADAPTER_WEIGHTS)
    expected = adapter_state(model)
    for what, names in (
        ("missing", expected.keys() - stored.keys()),
        ("unexpected", stored.keys() - expected.keys()),
        (
            "of another shape",
            {n for n in expected.keys() & stored.keys() if expected[n].shape != stored[n].shape},
        ),
    ):
        if names:
            raise CheckpointError(
                f"{folder / ADAPTER_WEIGHTS}: {len(names)} tensors are {what}, first "
                f"{min(names)!r}; it was written with other `tune` settings"
            )
    layers = dict(_layers(model))
    with torch.no_grad():
        for name, layer in layers.items():
            if _is_pissa(layer):
                _restart_pissa(layer, *(stored[f"{PREFIX}{name}.lora_{k}.weight"] for k in "AB"))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                tensor = stored[PREFIX + name.replace(f".{_NAME}", "")]
                part = tuple(slice(size) for size in parameter.shape)  # PiSSA's trained half
                parameter.copy_(tensor[part])


def _layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _factors(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight


def _is_pissa(layer: LoraLayer) -> bool:
    return hasattr(layer, "pissa_start")


def _restart_pissa(layer: LoraLayer, down: torch.Tensor, up: torch.Tensor) -> None:
    """Give a layer the start that an adapter was trained from: factors and residual base."""
    rank = layer.r[_NAME]
    start = (down[rank:].clone(), -up[:, rank:])
    before = layer.pissa_start
    if not all(torch.equal(a.cpu(), b) for a, b in zip(before, start, strict=True)):
        weight = layer.get_base_layer().weight
        scale = layer.scaling[_NAME]
        moved = weight.float() + scale * (before[1] @ before[0]).to(weight.device)
        moved -= scale * (start[1] @ start[0]).to(weight.device)
        weight.data = moved.to(weight.dtype)
    layer.pissa_start = tuple(part.to(before[0]) for part in start)
