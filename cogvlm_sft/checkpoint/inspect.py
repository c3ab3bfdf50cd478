"""What a checkpoint is, from its headers alone: kind, parameters per group, what is missing.

Nothing of the weights is read and torch is not imported (its import takes longer than everything
else here), so 35 GB are described in a fraction of a second. A safetensors header is a length and
JSON, read by hand for the same reason. A SAT checkpoint is a pickle: for it torch is loaded, and
maps the file.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogvlm_sft.checkpoint.layout import entries, with_released_default
from cogvlm_sft.checkpoint.weight_index import WEIGHT_DTYPES, shard_names
from cogvlm_sft.errors import CheckpointError

_GROUPS = ("language", "visual_expert", "adapter", "vision_tower", "embeddings")
_COMPUTED = "rotary_emb.inv_freq"
# Sizes that the layout is computed from.
_SIZES = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size",
)  # fmt: skip
_VISION_SIZES = (
    "hidden_size", "image_size", "intermediate_size", "num_heads", "num_hidden_layers",
    "num_positions", "patch_size",
)  # fmt: skip
_LONGEST_HEADER = 100_000_000  # safetensors' own limit
Headers = dict[str, tuple[str, tuple[int, ...]]]


@dataclass
class Inspection:
    """What `inspect_checkpoint` found.

    Attributes:
        kind: released, ours (with processor), SAT, or adapter.
        model: CogVLM or CogVLM2; of an adapter, the base it names.
        parameters: scalars per group; of an adapter, in its matrices.
        dtypes: dtype to number of tensors.
        details: further lines, name to value.
        problems: what is missing or does not fit; empty where the checkpoint is whole.
    """

    path: Path
    kind: str
    model: str
    parameters: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, int] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def table(self) -> str:
        """What the command prints."""
        lines = [f"{self.path}: {self.kind}, {self.model}", ""]
        rows = [(name, f"{count:,}") for name, count in self.parameters.items()]
        rows.append(("total", f"{sum(self.parameters.values()):,}"))
        wide = max(len(count) for _, count in rows)
        lines += [f"{name:<14} {count:>{wide}}" for name, count in rows]
        lines.append("")
        kinds = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in self.dtypes.items())
        lines += [f"{'dtype':<14} {kinds}"]
        lines += [f"{name:<14} {value}" for name, value in self.details.items()]
        if not self.problems:
            return "\n".join([*lines, f"{'missing':<14} nothing"])
        return "\n".join([*lines, "", *(f"problem: {problem}" for problem in self.problems)])


def inspect_checkpoint(path: str | Path) -> Inspection:
    """Describes a checkpoint folder (or a SAT rank file).

    Raises:
        CheckpointError: there is nothing that could be a checkpoint.
    """
    place = Path(path)
    if (place / "config.json").is_file():
        return _inspect_folder(place)
    if (place / "adapter_config.json").is_file():
        return _inspect_adapter(place)
    is_sat = place.suffix == ".pt" or (place / "latest").is_file()
    if is_sat or any(place.glob("mp_rank_*_model_states.pt")):
        return _inspect_sat(place)
    raise CheckpointError(
        f"{place} is no checkpoint: expected a folder with config.json (released layout), "
        "adapter_config.json, or mp_rank_NN_model_states.pt (SAT)"
    )


def read_header(file: Path) -> Headers:
    """Dtype and shape of every tensor of a safetensors file, whose size must fit its header.

    Raises:
        CheckpointError: the file is truncated or none.
    """
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError("no header")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = 8 + length + max((e["data_offsets"][1] for e in header.values()), default=0)
        found = {name: (e["dtype"], tuple(e["shape"])) for name, e in header.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{file}: not a safetensors file, or cut in its header") from None
    if (size := file.stat().st_size) != end:
        raise CheckpointError(
            f"{file}: {size:,} bytes, {end:,} by its header; incomplete, fetch it again"
        )
    return found


def _inspect_folder(folder: Path) -> Inspection:
    config = _read_config(folder / "config.json")
    vision = config["vision_config"]
    wanted = {entry.name: entry for entry in entries(config)}
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    second = config.get("num_multi_query_heads") is not None
    has_processor = (folder / "processor_config.json").is_file()
    problems: list[str] = []
    found, size = _read_weights(folder, problems)
    names = {name for name in found if not name.endswith(_COMPUTED)}
    _compare(names, found, wanted, problems, whole=not problems)
    problems = [*_contradictions(config), *problems]
    tokenizer = [
        name for name in ("tokenizer.json", "tokenizer.model") if (folder / name).is_file()
    ]
    tokens = patches // (4 if second else 1) + 2
    counts = Counter[str]()
    for name in names & wanted.keys():
        counts[wanted[name].group] += math.prod(found[name][1])
    return Inspection(
        path=folder,
        kind="ours, with its processor" if has_processor else "released layout",
        model="CogVLM2" if second else "CogVLM",
        parameters={group: counts[group] for group in _GROUPS},
        dtypes=dict(Counter(found[name][0] for name in sorted(names))),
        details={
            "weights": f"{size / 1e9:,.2f} GB on the disk",
            "resolution": f"{vision['image_size']} px, {tokens:,} tokens a picture",
            "template": str(config.get("template_version", "none named: chat is taken")),
            "tokenizer": ", ".join(tokenizer)
            or "none, as released: name Vicuna's (CogVLM2: Llama-3's) where one is asked for",
            "remote code": "named in auto_map; cogvlm-sft never runs it"
            if "auto_map" in config
            else "none",
        },
        problems=problems,
    )


def _read_config(file: Path) -> dict[str, Any]:
    """config.json, with every size that the layout is computed from.

    Raises:
        CheckpointError: it is not a CogVLM's.
    """
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}") from None
    vision = config.get("vision_config") if isinstance(config, dict) else None
    if not isinstance(vision, dict):
        found = config.get("architectures") if isinstance(config, dict) else None
        raise CheckpointError(
            f"{file}: no vision_config in it, so this is not a CogVLM (architectures: {found})"
        )
    config = with_released_default(config)
    for fields, names, where in (
        (config, _SIZES, ""),
        (vision, _VISION_SIZES, "vision_config."),
        (
            config,
            ("num_multi_query_heads",) * (config.get("num_multi_query_heads") is not None),
            "",
        ),
    ):
        for name in names:
            value = fields.get(name)
            if type(value) is not int or value < 1:
                raise CheckpointError(
                    f"{file}: {where}{name} is {value!r}, expected a whole number from 1"
                )
    return config


def _contradictions(config: Mapping[str, Any]) -> Iterator[str]:
    """What loading would refuse though every tensor has the shape that config.json says."""
    vision = config["vision_config"]
    grid, rest = divmod(vision["image_size"], vision["patch_size"])
    if rest or vision["num_positions"] != grid**2 + 1:
        yield (
            f"config.json: {vision['num_positions']} positions do not fit pictures of "
            f"{vision['image_size']} px in patches of {vision['patch_size']} px"
        )
    if config["hidden_size"] % config["num_attention_heads"]:
        yield "config.json: hidden_size is not a multiple of num_attention_heads"
    if vision["hidden_size"] % vision["num_heads"]:
        yield "config.json: hidden_size of vision_config is not a multiple of its num_heads"
    if config.get("tie_word_embeddings"):
        yield "config.json: tie_word_embeddings is true, and the layout has a head of its own"


def _read_weights(folder: Path, problems: list[str]) -> tuple[Headers, int]:
    """All headers, and the bytes of all files; what cannot be read goes to `problems`."""
    index = folder / "model.safetensors.index.json"
    files = [folder / "model.safetensors"]
    if not files[0].is_file() and index.is_file():
        try:
            files = [folder / name for name in shard_names(index)]
        except CheckpointError as error:
            problems.append(str(error))
            files = []
    found: Headers = {}
    size = 0
    for file in files:
        if not file.is_file():
            problems.append(f"{file.name} is missing")
            continue
        size += file.stat().st_size
        try:
            header = read_header(file)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if twice := sorted(found.keys() & header.keys()):
            problems.append(f"{twice[0]} stands in {file.name} and in another file")
        found |= header
    return found, size


def _compare(
    names: set[str],
    found: Headers,
    wanted: Mapping[str, Any],
    problems: list[str],
    *,
    whole: bool,
) -> None:
    """Missing (where every file was read), unknown and misshapen tensors."""
    if whole and (missing := sorted(wanted.keys() - names)):
        problems.append(f"{len(missing)} tensors are missing, first {missing[0]}")
    if unknown := sorted(names - wanted.keys()):
        problems.append(f"{len(unknown)} unknown tensors, first {unknown[0]}")
    for name in sorted(names & wanted.keys()):
        if found[name][0] not in WEIGHT_DTYPES:
            problems.append(
                f"{name} is of dtype {found[name][0]}, expected {' or '.join(WEIGHT_DTYPES)}"
            )
        if found[name][1] != wanted[name].shape:
            problems.append(
                f"{name} has shape {found[name][1]}, {wanted[name].shape} by config.json"
            )


def _inspect_adapter(folder: Path) -> Inspection:
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base, rank = settings.get("base_model_name_or_path"), settings.get("r")
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'adapter_config.json'}: {error}") from None
    problems: list[str] = []
    file = folder / "adapter_model.safetensors"
    found: Headers = {}
    if file.is_file():
        try:
            found = read_header(file)
        except CheckpointError as error:
            problems.append(str(error))
    else:
        problems.append("adapter_model.safetensors is missing")
    if isinstance(base, str) and Path(base).is_absolute() and not Path(base).is_dir():
        problems.append(f"the base {base} is not there; name it when merging (--base)")
    return Inspection(
        path=folder,
        kind=f"adapter ({settings.get('peft_type', 'unknown')})",
        model=f"for {base}",
        parameters={"adapter": sum(math.prod(shape) for _, shape in found.values())},
        dtypes=dict(Counter(dtype for dtype, _ in found.values())),
        details={"rank": str(rank), "targets": str(settings.get("target_modules"))},
        problems=problems,
    )


def _inspect_sat(path: Path) -> Inspection:
    from cogvlm_sft.checkpoint.sat import SatCheckpoint

    sat = SatCheckpoint.open(path)
    wanted = {entry.name: entry for entry in entries(sat.config.to_dict())}
    counts = Counter[str]()
    for name in sat.parts.keys() & wanted.keys():
        counts[wanted[name].group] += math.prod(wanted[name].shape)
    vision = sat.config.vision_config
    tensors = [sat.ranks[0].state[name] for name in sat.parts.values()]
    return Inspection(
        path=path,
        kind=f"SAT, {len(sat.ranks)} rank(s)" + (", LoRA beside the weights" if sat.lora else ""),
        model="CogVLM",
        parameters={group: counts[group] for group in _GROUPS},
        dtypes=dict(Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)),
        details={
            "resolution": f"{vision.image_size} px, {sat.config.num_image_tokens:,} tokens a "
            "picture",
            "template": "not written in SAT checkpoints; name it when converting (--template)",
            "tokenizer": "none",
        },
        problems=[f"{name} is missing" for name in sorted(wanted.keys() - sat.parts.keys())[:3]],
    )
