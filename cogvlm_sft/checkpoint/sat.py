"""Checkpoints of the authors' SwissArmyTransformer code, converted to the released layout.

A SAT checkpoint is a folder with `latest`, `model_config.json` and a folder per step that holds one
file per model-parallel rank (`mp_rank_00_model_states.pt`). Files are read with `weights_only` and
mapped, not loaded; the mapping is dropped and made anew as the conversion goes on, because pages
that were read count as the process's memory. LoRA matrices (`original`, `matrix_A`, `matrix_B`) are
merged rank by rank, as SAT's own merge does; then ranks are joined: columns by rows, QKV by its
thirds, rows by columns, and what every rank holds whole is taken once.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogvlm_sft.checkpoint.load import (
    OPTIONAL_SUFFIX,
    build_processor,
    expected_shapes,
    make_config,
    save_processor,
    torch_dtype,
)
from cogvlm_sft.checkpoint.sat_names import COMPUTED, LORA, released_name
from cogvlm_sft.checkpoint.staging import staged
from cogvlm_sft.checkpoint.weights import Planned, check_fit, write_weights
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.model import CogVLMConfig
from cogvlm_sft.model.attention_cogvlm import inverse_frequencies

_RANK = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_MOST = 1024  # ranks, heads: far above any, and a bound for a file from elsewhere
_REMAP_BYTES = 2**27  # mapped pages that may be touched before a file is mapped anew


@dataclass
class _Rank:
    """One rank's file, mapped; the mapping is renewed as its pages are used up."""

    file: Path
    state: dict[str, torch.Tensor] = field(init=False)
    touched: int = 0

    def __post_init__(self) -> None:
        self.state = _map(self.file)

    def read(self, name: str) -> torch.Tensor:
        """A tensor in memory of its own."""
        if self.touched > _REMAP_BYTES:
            self.state = {}
            self.state, self.touched = _map(self.file), 0
        tensor = self.state[name]
        self.touched += tensor.nbytes
        return tensor.clone()


@dataclass(frozen=True)
class SatCheckpoint:
    """A SAT checkpoint, mapped.

    Attributes:
        ranks: one file each.
        parts: SAT's name of the (original) tensor of every released name.
        config: what its tensors and model_config.json say.
    """

    ranks: list[_Rank]
    parts: dict[str, str]
    config: CogVLMConfig

    @classmethod
    def open(cls, path: str | Path, template: str = "chat") -> SatCheckpoint:
        """Maps the files; see `convert_sat`.

        Raises:
            CheckpointError: files are missing, damaged or not a CogVLM's.
        """
        files, described = find_rank_files(path)
        ranks = [_Rank(file) for file in files]
        parts = _parts(ranks)
        return cls(ranks, parts, _config(ranks, parts, described, template))

    @property
    def lora(self) -> bool:
        """Whether LoRA matrices stand beside the weights."""
        return any(LORA.fullmatch(name) for name in self.ranks[0].state)


def convert_sat(
    path: str | Path,
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    template: str = "chat",
    dtype: str | torch.dtype | None = None,
    lora_alpha: float = 1.0,
) -> Path:
    """Converts a SAT checkpoint of CogVLM.

    Args:
        path: folder of the checkpoint (the step in `latest` is taken), of one step, or a rank file
            that is the only one.
        out: new folder, in the released layout.
        tokenizer: tokenizer folder to put beside the weights; None leaves it out, as released.
        template: prompt style the weights were trained with: chat, base or vqa (SAT's --version).
        dtype: of the weights on the disk; None keeps theirs.
        lora_alpha: of LoRA matrices; 1 is what SAT's `LoraMixin` has by default. Their rank is
            seen from their shapes.

    Returns:
        `out`.

    Raises:
        CheckpointError: files are missing, damaged or not a CogVLM's, or hold 4-bit weights.
    """
    sat = SatCheckpoint.open(path, template)
    config, parts, ranks = sat.config, sat.parts, sat.ranks
    expected = expected_shapes(config)
    check_fit(
        ranks[0].file.parent,
        {name: _joined(name, parts, ranks, expected) for name in parts},
        expected,
        optional=OPTIONAL_SUFFIX,
    )
    processor = None if tokenizer is None else build_processor(config, tokenizer)
    kept = torch_dtype(dtype) if dtype else ranks[0].state[parts["lm_head.weight"]].dtype
    config.dtype = kept
    config.architectures = ["CogVLMForCausalLM"]
    with staged(out) as folder:
        planned = [
            Planned(
                name,
                shape,
                kept,
                partial(_read, name, parts[name], ranks, shape, lora_alpha)
                if name in parts
                else partial(inverse_frequencies, config),
            )
            for name, shape in expected.items()
        ]
        write_weights(folder, planned, label="convert")
        config.save_pretrained(folder)
        if processor is not None:
            save_processor(processor, folder)
    return Path(out)


def find_rank_files(path: str | Path) -> tuple[list[Path], dict[str, Any]]:
    """The rank files of a SAT checkpoint, in order, and its model_config.json ({} without one).

    Raises:
        CheckpointError: there are none, or ranks are missing.
    """
    place = Path(path)
    folder = place if place.is_dir() else place.parent
    if not place.exists():
        raise CheckpointError(f"SAT checkpoint {place} does not exist")
    latest = folder / "latest"
    step = folder
    if place.is_dir() and latest.is_file():
        step = folder / latest.read_text(encoding="utf-8", errors="replace").strip()
    found = {
        int(match[1]): file
        for file in (step.iterdir() if step.is_dir() else ())
        if (match := _RANK.fullmatch(file.name))
    }
    if not found:
        raise CheckpointError(
            f"{step} holds no mp_rank_NN_model_states.pt; expected a SAT checkpoint (a folder "
            "with `latest`, or a step's folder)"
        )
    described: dict[str, Any] = {}
    for file in (folder / "model_config.json", step.parent / "model_config.json"):
        if file.is_file():
            described = _read_description(file)
            break
    count = max(*found, described.get("model_parallel_size", 1) - 1) + 1
    missing = [f"mp_rank_{rank:02}_model_states.pt" for rank in range(count) if rank not in found]
    if missing:
        raise CheckpointError(
            f"{step}: {len(missing)} of {count} model-parallel ranks are missing "
            f"({', '.join(missing[:3])}); fetch them too"
        )
    return [found[rank] for rank in sorted(found)], described


def _read_description(file: Path) -> dict[str, Any]:
    """model_config.json, with counts where it names any.

    Raises:
        CheckpointError: it is not JSON, or a count in it is none.
    """
    try:
        described: Any = json.loads(file.read_text(encoding="utf-8"))
        towers = described.get("eva_args") or {}
        counts = {
            "model_parallel_size": described.get("model_parallel_size", 1),
            "num_attention_heads": described.get("num_attention_heads", 1),
            "num_attention_heads of eva_args": towers.get("num_attention_heads", 1),
        }
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read as SAT's JSON: {error}") from None
    for name, count in counts.items():
        if type(count) is not int or not 1 <= count <= _MOST:
            raise CheckpointError(f"{file}: {name} is {count!r}, expected 1 to {_MOST}")
    found: dict[str, Any] = described
    return found


def _map(file: Path) -> dict[str, torch.Tensor]:
    """A rank's tensors, mapped from the file.

    Raises:
        CheckpointError: the file is damaged, holds more than data, or is no SAT checkpoint.
    """
    # What training checkpoints hold besides tensors: arguments, and NumPy's random state.
    harmless: list[Any] = [
        argparse.Namespace,
        np.ndarray,
        np.dtype,
        np._core.multiarray._reconstruct,  # type: ignore[attr-defined]
        type(np.dtype(np.uint32)),
    ]
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"{file}: damaged or incomplete, no archive as torch.save writes; fetch it again (a "
            "file of torch before 1.6 must be saved anew)"
        )
    try:
        with torch.serialization.safe_globals(harmless):
            loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own words advise to load it all the same.
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{file}: holds Python objects that could run code"
            f"{f' ({named[1]})' if named else ''}; expected tensors and plain values only"
        ) from None
    except (RuntimeError, OSError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{file}: damaged or incomplete ({str(error).splitlines()[0]}); fetch it again"
        ) from None
    state = loaded.get("module") if isinstance(loaded, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{file}: no 'module' in it, which holds the weights of a SAT checkpoint"
        )
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def _parts(ranks: list[_Rank]) -> dict[str, str]:
    """SAT's name of the (original) tensor of every released name.

    Raises:
        CheckpointError: a tensor is none of a CogVLM's, is 4-bit, or ranks hold different names.
    """
    parts: dict[str, str] = {}
    for name, tensor in ranks[0].state.items():
        if COMPUTED.fullmatch(name) or LORA.fullmatch(name):
            continue
        if tensor.dtype == torch.uint8:
            raise CheckpointError(
                f"{ranks[0].file}: {name} is 4-bit; expected 16 or 32 bits (merge the QLoRA run "
                "with SAT first, or convert the checkpoint it started from)"
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{ranks[0].file}: {name} is of {tensor.dtype}, expected floats")
        ours = released_name(name)
        if ours is None:
            raise CheckpointError(f"{ranks[0].file}: {name} is no tensor of a CogVLM")
        parts[ours] = name
    for rank in ranks[1:]:
        if differing := ranks[0].state.keys() ^ rank.state.keys():
            raise CheckpointError(
                f"{rank.file}: holds other tensors than {ranks[0].file.name} "
                f"({', '.join(sorted(differing)[:3])}); expected ranks of one checkpoint"
            )
    return parts


def _joined(
    name: str, parts: Mapping[str, str], ranks: list[_Rank], expected: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...]:
    """The shape of a tensor over all ranks; of one rank where it cannot be joined."""
    shapes = [tuple(rank.state[parts[name]].shape) for rank in ranks]
    if name.endswith(("boi", "eoi")):
        shapes = [(1, 1, shape[-1]) for shape in shapes]
    wanted = expected.get(name)
    axis = _axis(shapes, wanted) if wanted else None
    if axis is None:
        return shapes[0]
    size = sum(shape[axis] for shape in shapes)
    return (*shapes[0][:axis], size, *shapes[0][axis + 1 :])


def _axis(shapes: list[tuple[int, ...]], wanted: tuple[int, ...]) -> int | None:
    """The axis along which ranks were split; None where each holds the whole."""
    if shapes[0] == wanted or len(shapes) == 1:
        return None
    return next(
        (
            axis
            for axis in range(len(wanted))
            if sum(shape[axis] for shape in shapes) == wanted[axis]
        ),
        None,
    )


def _read(
    name: str, theirs: str, ranks: list[_Rank], wanted: tuple[int, ...], lora_alpha: float
) -> torch.Tensor:
    """A tensor, its LoRA merged, over all ranks."""
    tensors = [_merged(rank, theirs, lora_alpha) for rank in ranks]
    axis = _axis([tuple(tensor.shape) for tensor in tensors], wanted)
    if axis is None:
        return tensors[0].reshape(wanted)
    if "query_key_value" in name:
        thirds = zip(*(tensor.chunk(3) for tensor in tensors), strict=True)
        return torch.cat([piece for third in thirds for piece in third])
    return torch.cat(tensors, dim=axis)


def _merged(rank: _Rank, name: str, lora_alpha: float) -> torch.Tensor:
    """One rank's tensor with its LoRA matrices added, the sum taken in fp32."""
    tensor = rank.read(name)
    if not name.endswith(".original.weight"):
        return tensor
    module = name.removesuffix(".original.weight")
    updates: list[torch.Tensor] = []
    while f"{module}.matrix_A.{len(updates)}" in rank.state:
        first = rank.read(f"{module}.matrix_A.{len(updates)}").float()
        second = rank.read(f"{module}.matrix_B.{len(updates)}").float()
        updates.append(second @ first * (lora_alpha / first.shape[0]))
    return (tensor.float() + torch.cat(updates)).to(tensor.dtype) if updates else tensor


def _config(
    ranks: list[_Rank], parts: Mapping[str, str], described: Mapping[str, Any], template: str
) -> CogVLMConfig:
    """Sizes from the tensors; head counts, which no tensor shows, from model_config.json.

    Raises:
        CheckpointError: tensors that sizes are read from are missing.
    """

    def rows(name: str) -> int:
        return sum(rank.state[parts[name]].shape[0] for rank in ranks)

    def width(name: str) -> int:
        return int(ranks[0].state[parts[name]].shape[-1])

    def layers(prefix: str) -> int:
        pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
        return 1 + max((int(m[1]) for m in map(pattern.match, parts) if m), default=-1)

    tower, vision = "model.vision.transformer.layers.", "model.vision.patch_embedding."
    eva = described.get("eva_args") or {}
    try:
        patch = width(f"{vision}proj.weight")
        positions = ranks[0].state[parts[f"{vision}position_embedding.weight"]].shape[0]
        fields = {
            "vocab_size": rows("model.embed_tokens.weight"),
            "hidden_size": width("model.norm.weight"),
            "intermediate_size": rows("model.layers.0.mlp.language_mlp.up_proj.weight"),
            "num_hidden_layers": layers("model.layers."),
            "num_attention_heads": described.get("num_attention_heads", 32),
            "template_version": template,
            "vision_config": {
                "hidden_size": width(f"{tower}0.input_layernorm.weight"),
                "intermediate_size": rows(f"{tower}0.mlp.fc1.weight"),
                "num_hidden_layers": layers(tower),
                "num_heads": eva.get("num_attention_heads", 16),
                "image_size": round((positions - 1) ** 0.5) * patch,
                "num_positions": positions,
                "patch_size": patch,
            },
        }
    except KeyError as error:
        raise CheckpointError(
            f"{ranks[0].file}: no tensor for {error.args[0]}; expected a SAT checkpoint of CogVLM"
        ) from None
    except IndexError:
        raise CheckpointError(
            f"{ranks[0].file}: a single number where a matrix or vector belongs; expected a SAT "
            "checkpoint of CogVLM"
        ) from None
    return make_config(fields, where=str(ranks[0].file))
