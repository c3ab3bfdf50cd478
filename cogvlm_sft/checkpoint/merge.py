"""Merging an adapter into its base, shard by shard, and the proof that nothing else changed.

The base is the unquantised checkpoint, whatever the adapter was trained beside: merging into 4-bit
weights would round every delta away. One tensor at a time is read, merged in fp32 by PEFT's own
layer (so that LoRA, rsLoRA and DoRA are what PEFT says they are) and written in the base's dtype;
memory holds a matrix and its merged copies. Afterwards a probe batch is run through the merged
weights and through base + adapter, block by block in fp32; a difference above 1e-5 of the largest
logit is an error, and no checkpoint is left.
"""

import copy
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from peft import LoraConfig
from tqdm import tqdm

from cogvlm_sft.allocator import return_freed_memory
from cogvlm_sft.checkpoint.adapter import (
    ADAPTER_NAME,
    adapter_tensors,
    add_factors,
    base_of,
    lora_config,
    quantized_groups,
    trained_image_size,
)
from cogvlm_sft.checkpoint.load import load_config, stored_weights, weight_files
from cogvlm_sft.checkpoint.positions import (
    POSITION_EMBEDDING,
    with_image_size,
)
from cogvlm_sft.checkpoint.probe import Weights, probe_batch, streamed_logits
from cogvlm_sft.checkpoint.staging import staged
from cogvlm_sft.checkpoint.weights import (
    INDEX,
    Planned,
    dtype_of,
    read_headers,
    read_tensor,
    write_shard,
)
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.model import CogVLMConfig, CogVLMForCausalLM
from cogvlm_sft.tune.naming import ADAPTER_CONFIG, linears_of

LIMIT = 1e-5
# Starts of the factors that leave the base's weights as they are; PEFT's others move them.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What `merge` did; differences are the largest of any logit over the largest logit.

    Attributes:
        out: the merged checkpoint.
        base: what was merged into.
        linears: matrices that got a delta.
        tensors: weights that were trained in full and took the place of the base's.
        difference: of the merged weights, in fp32, to base + adapter.
        rounded: of the files as written; equal to `difference` where they are in fp32.
        four_bit: of base + adapter to the run that trained it beside 4-bit weights; None if it
            did not.
    """

    out: Path
    base: Path
    linears: int
    tensors: int
    difference: float
    rounded: float
    four_bit: float | None

    def summary(self) -> str:
        """A few lines for a terminal."""
        lines = [
            f"{self.linears} linears merged, {self.tensors} tensors replaced, base {self.base}",
            f"largest difference of a logit on a probe, as a share of the largest logit "
            f"(limit {LIMIT:g}):",
            f"  merged in fp32 - base + adapter:  {self.difference:.1e}",
        ]
        if self.rounded != self.difference:
            lines.append(f"  merged as written - base + adapter: {self.rounded:.1e} (rounding)")
        if self.four_bit is not None:
            lines.append(
                f"  base + adapter - the 4-bit model it was trained on: {self.four_bit:.1e}"
            )
        return "\n".join([*lines, f"checkpoint: {self.out}"])


def merge(adapter: str | Path, out: str | Path, *, base: str | Path | None = None) -> MergeReport:
    """Merge an adapter into its base and check the result.

    Args:
        adapter: the folder of a finished run, of one of its snapshots, or any PEFT LoRA adapter.
        out: new folder for the checkpoint, in the released layout.
        base: whole checkpoint, in place of the one that the adapter names.

    Raises:
        CheckpointError: a folder is missing, adapter and base do not fit, `out` exists, or the
            merged weights fail the check; nothing is left then.
    """
    return_freed_memory()
    folder, target = _adapter_folder(Path(adapter)), Path(out)
    root = base_of(folder, base)
    if target.exists():
        raise CheckpointError(f"{target} exists; choose another folder")
    work = _Merge(folder, root)
    with staged(target) as staging:
        work.write(staging)
        difference, rounded, four_bit = work.check(staging)
        if not difference <= LIMIT:
            raise CheckpointError(
                f"merged weights and base + adapter differ by {difference:.1e} of the largest "
                f"logit, expected at most {LIMIT:g}; nothing was written"
            )
        _copy_files(folder, root, staging, work.image_size)
    return MergeReport(
        target, root, len(work.linears), len(work.replaced), difference, rounded, four_bit
    )


class _Merge:
    """An adapter beside its base, both read tensor by tensor."""

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.base = folder, root
        if getattr(load_config(root), "quantization_config", None):
            raise CheckpointError(f"{root}: a quantised checkpoint; merge into the 16-bit original")
        self.image_size = trained_image_size(folder)
        self.stored = stored_weights(root, self.image_size)
        self.model_config: CogVLMConfig = self.stored.config
        self.files, self.home = weight_files(root), self.stored.headers
        with torch.device("meta"):
            self.plain = CogVLMForCausalLM(self.model_config).eval()
            self.worn = CogVLMForCausalLM(self.model_config).eval()
        self.config = _mergeable_config(folder)
        add_factors(self.worn, folder, self.config)
        self.worn.eval()
        self.adapter = adapter_tensors(folder)
        self.linears = {n.partition(".lora_")[0] for n in self.adapter if ".lora_" in n}
        self.replaced = {name for name in self.adapter if ".lora_" not in name}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor of the result: the base's, but for positions of another picture size."""
        shape = self.home[name].shape
        if name != POSITION_EMBEDDING:
            return shape
        return (self.model_config.vision_config.num_positions, *shape[1:])

    def read(self, name: str, folder: Path | None = None) -> torch.Tensor:
        """A tensor of the base at the adapter's picture size, or of the result in its folder."""
        if folder is None:
            return self.stored.read(name)
        header = self.home[name]
        return read_tensor(name, replace(header, file=folder / header.file.name))

    def merged(self, name: str) -> torch.Tensor:
        """A tensor of the result in fp32 where the adapter touches it, else the base's own."""
        module, _, kind = name.rpartition(".")
        if module not in self.linears or not (kind == "weight" or self.config.lora_bias):
            return self.adapter[name].float() if name in self.replaced else self.read(name)
        layer = copy.deepcopy(self.worn.get_submodule(module))
        weights = self.beside(self.read)
        state = {
            # What the adapter holds is copied, since PEFT adds in place.
            part: weights(f"{module}.{part}").to(torch.float32, copy=name in self.replaced)
            for part, _ in layer.named_parameters()
        }
        layer.load_state_dict(state, strict=False, assign=True)
        try:
            layer.merge()
        except RuntimeError as error:
            raise CheckpointError(f"{self.folder}: {module} cannot be merged: {error}") from None
        result: torch.Tensor = getattr(layer.get_base_layer(), kind).detach()
        return result

    def write(self, staging: Path) -> None:
        """Every shard of the base, merged, under its own name and in its own dtypes."""
        with tqdm(total=len(self.home), desc="merging", unit="tensor") as bar:
            for file in self.files:
                planned = [
                    Planned(name, self.shape(name), dtype_of(header), partial(self.merged, name))
                    for name, header in read_headers([file]).items()
                ]
                write_shard(staging / file.name, planned, lambda _: bar.update())
        if self.files[0].name != "model.safetensors":
            shutil.copyfile(self.base / INDEX, staging / INDEX)

    def check(self, staging: Path) -> tuple[float, float, float | None]:
        """The three differences of `MergeReport`."""
        batch = probe_batch(self.model_config)
        expected = streamed_logits(self.worn, self.beside(self.read), batch, "base + adapter")
        scale = expected.abs().max()

        def differs(logits: torch.Tensor) -> float:
            return ((logits - expected).abs().max() / scale).item()

        written = streamed_logits(
            self.plain, lambda n: self.read(n, staging), batch, "merged, written"
        )
        rounded = difference = differs(written)
        if any(self.read(f"{name}.weight").dtype != torch.float32 for name in self.linears):
            exact = streamed_logits(self.plain, self.merged, batch, "merged, in fp32")
            difference = differs(exact)
        found = quantized_groups(self.folder)
        if found is None:
            return difference, rounded, None
        groups, dtype = found
        held = {f"{name}.weight" for group in groups for name in linears_of(self.plain, group)}

        def four_bit(name: str) -> torch.Tensor:
            weight = self.read(name)
            return _through_nf4(weight.to(dtype)) if name in held else weight

        return (
            difference,
            rounded,
            differs(streamed_logits(self.worn, self.beside(four_bit), batch, "4-bit + adapter")),
        )

    def beside(self, base: Weights) -> Weights:
        """Weights of a model with LoRA layers: factors of the adapter, the rest of a base."""

        def weights(name: str) -> torch.Tensor:
            name = name.replace(f".{ADAPTER_NAME}", "").replace(".base_layer.", ".")
            return self.adapter[name] if name in self.adapter else base(name)

        return weights


def _mergeable_config(folder: Path) -> LoraConfig:
    config = lora_config(folder)
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: init_lora_weights is {config.init_lora_weights!r}, which "
            "changes the base's weights before training; save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    return config


def _adapter_folder(path: Path) -> Path:
    """The folder itself, or an error that says which snapshots an unfinished run has."""
    if (path / ADAPTER_CONFIG).is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"adapter folder {path} does not exist")
    inside = sorted(file.parent for file in path.glob(f"snapshots/*/{ADAPTER_CONFIG}"))
    if inside:
        listed = ", ".join(str(found) for found in inside[-3:])
        raise CheckpointError(
            f"{path} is a run that has not finished; merge one of its snapshots, such as {listed}"
        )
    raise CheckpointError(
        f"{path} holds no {ADAPTER_CONFIG}, so it is no adapter; a run without lora groups writes "
        "a whole checkpoint, which needs no merging"
    )


def _through_nf4(weight: torch.Tensor) -> torch.Tensor:
    """What is left of a matrix after double-quantised NF4, in fp32."""
    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    restored: torch.Tensor = dequantize_4bit(packed, state).float()
    return restored


def _copy_files(folder: Path, root: Path, staging: Path, image_size: int | None) -> None:
    """The base's configuration; the adapter's processor where it has one, else the base's."""
    origin = folder if any((folder / n).is_file() for n in _PROCESSOR_FILES) else root
    for file in _existing(root, ("config.json", "generation_config.json")):
        shutil.copyfile(file, staging / file.name)
    for file in _existing(origin, _PROCESSOR_FILES):
        shutil.copyfile(file, staging / file.name)
    if image_size is not None:
        file = staging / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
        vision = with_image_size(load_config(root), image_size).vision_config
        sizes = {"image_size": vision.image_size, "num_positions": vision.num_positions}
        config["vision_config"] |= sizes
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _existing(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    yield from (folder / name for name in names if (folder / name).is_file())
