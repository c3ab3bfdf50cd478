"""Everything that can be wrong with a run, looked for before the expensive part, cheapest first.

`check_output` decides between a fresh start and a resume, and never lets two different runs write
into one folder. `check_ready` needs no weights: paths, packages, and whether the memory of this
machine holds what the estimate says; all that is missing comes in one message. The conversations
are checked after that, by `data.mixture`, which encodes each of them once.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from cogvlm_sft import launch
from cogvlm_sft.checkpoint.load import (
    build_processor,
    load_config,
    load_processor,
    own_device,
    weight_files,
)
from cogvlm_sft.checkpoint.sharded import is_sharded
from cogvlm_sft.conversation import conversation_files
from cogvlm_sft.errors import CheckpointError, CogVLMSFTError, RecipeError
from cogvlm_sft.evaluation.run import check_task
from cogvlm_sft.model import CogVLMConfig, CogVLMProcessor
from cogvlm_sft.recipe import Recipe
from cogvlm_sft.training import snapshots
from cogvlm_sft.training.estimate import GIB, estimate, model_config
from cogvlm_sft.training.row_index import is_index
from cogvlm_sft.training.samples import prompt_requests
from cogvlm_sft.training.services import check_service
from cogvlm_sft.tune.naming import ADAPTER_CONFIG

RECIPE_FILE = "recipe.yaml"

# Keys that may differ between a run and its resumption: they change neither the order of the data
# nor, beyond rounding, what is learnt.
_FREE_ON_RESUME = {
    "data.workers",
    "train.micro_batch_size",
    "train.save_every",
    "train.keep_snapshots",
    "train.resume",
    "train.gradient_checkpointing",
    "train.log_every",
    "train.report_to",
    "model.attention",
}


def check_ready(recipe: Recipe, world_size: int) -> None:
    """Look for what the run needs on this machine, without loading anything.

    Raises:
        RecipeError: one message that lists all that is missing.
    """
    missing: list[str] = []

    def check(key: str, look: Callable[[], Any]) -> Any:
        try:
            return look()
        except CogVLMSFTError as error:
            missing.append(f"{key}: {error}")
            return None

    model, data = recipe.model, recipe.data
    if model.checkpoint is not None:
        folder = model.checkpoint
        if check("model.checkpoint", lambda: load_config(folder)) is not None:
            check("model.checkpoint", lambda: weight_files(folder))
    config = check("model.config", lambda: model_config(recipe)[0])
    if config is not None:
        _check_tokenizer(recipe, missing)
        shortest = config.num_image_tokens + 3  # BOS before it; an answer's token and EOS behind
        if data.max_length is not None and data.max_length < shortest:
            missing.append(
                f"data.max_length: {data.max_length} is below the length of one image "
                f"({config.num_image_tokens} tokens, with BOS and text at least {shortest})"
            )
    for number, source in enumerate(data.train):
        check(f"data.train.{number}.path", partial(conversation_files, source.path))
    if data.validation is not None:
        validation = data.validation
        check("data.validation", lambda: conversation_files(validation))
    if not data.image_root.is_dir():
        missing.append(f"data.image_root: folder {data.image_root} does not exist")
    if recipe.evaluate is not None:
        prompts = recipe.evaluate.prompts
        check("evaluate.prompts", lambda: prompt_requests(prompts, data.image_root))
        for number, task in enumerate(recipe.evaluate.tasks):
            check(f"evaluate.tasks.{number}", partial(check_task, task))
    if (devices := torch.cuda.device_count()) > 1 and "WORLD_SIZE" not in os.environ:
        missing.append(
            f"{devices} GPUs are seen by one process, which trains on one; start one process a GPU "
            "(accelerate launch --config_file recipes/accelerate/fsdp2.yaml -m cogvlm_sft.cli "
            "train …), or name the one to use by CUDA_VISIBLE_DEVICES"
        )
    missing += _not_split(recipe)
    missing += _without_bfloat16(recipe)
    packages = ("flash_attn", "kernels")
    if model.attention == "flash_attention_2" and not any(map(_installed, packages)):
        missing.append(
            "model.attention: flash_attention_2 needs the package flash-attn; install it, or set "
            "sdpa, which trains with the FlashAttention-2 that torch ships"
        )
    if model.attention == "flex_attention" and not torch.cuda.is_available():
        missing.append(
            "model.attention: flex_attention has no backward pass on a CPU; set sdpa or eager"
        )
    service = recipe.train.report_to
    if service != "none" and not _installed(service):
        missing.append(
            f"train.report_to: the package {service} is not installed; pip install {service}"
        )
    check("train.report_to", lambda: check_service(service))
    if config is not None:
        missing += _memory_short(recipe, config, world_size)
    if len(missing) == 1:
        raise RecipeError(f"{recipe.source}: {missing[0]}")
    if missing:
        listed = "\n".join(f"  - {item}" for item in missing)
        raise RecipeError(f"{recipe.source} cannot run here; missing:\n{listed}")


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _not_split(recipe: Recipe) -> list[str]:
    """What FSDP2 and DeepSpeed cannot divide among the GPUs, and an FSDP that is not ours."""
    if not (launch.under_fsdp() or launch.under_deepspeed()):
        return []
    ddp = "use recipes/accelerate/ddp.yaml"
    found = []
    if launch.under_fsdp() and (told := launch.fsdp_settings()) != ("2", "SHARDED_STATE_DICT"):
        found.append(
            f"the launcher's configuration: FSDP version {told[0]} with {told[1]}; parameter "
            "groups need version 2, snapshots SHARDED_STATE_DICT (recipes/accelerate/fsdp2.yaml)"
        )
    if recipe.train.optimizer == "paged_adamw_8bit":
        found.append(
            "train.optimizer: paged_adamw_8bit keeps its moments in blocks of whole tensors, which "
            f"FSDP2 and DeepSpeed split; set it to adamw, or {ddp}"
        )
    if recipe.model.quantize is not None:
        found.append(
            f"model.quantize: FSDP2 and DeepSpeed do not split 4-bit weights; {ddp}, where every "
            "GPU holds them all"
        )
    return found


def _without_bfloat16(recipe: Recipe) -> list[str]:
    """torch imitates it on older GPUs, but the flash kernels of its attention do not run there."""
    if recipe.model.dtype != "bfloat16" or not torch.cuda.is_available():
        return []
    major, minor = torch.cuda.get_device_capability(own_device())
    if major >= 8:
        return []
    return [
        "model.dtype: bfloat16 needs a GPU of compute capability 8.0 (Ampere) or later; this is a "
        f"{torch.cuda.get_device_name(own_device())} of {major}.{minor}. Set it to float32"
    ]


def _check_tokenizer(recipe: Recipe, missing: list[str]) -> None:
    """The tokenizer folder, or the checkpoint's own tokenizer where none is named."""
    folder = recipe.model.tokenizer or recipe.model.checkpoint
    if folder is None or (recipe.model.tokenizer is None and not folder.is_dir()):
        return  # no checkpoint folder: reported already
    if not folder.is_dir():
        missing.append(f"model.tokenizer: folder {folder} does not exist")
    elif not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        missing.append(
            f"model.tokenizer: {folder} holds neither tokenizer.json nor tokenizer.model "
            "(released CogVLM folders carry none; lmsys/vicuna-7b-v1.5 has the right one)"
        )


def _memory_short(recipe: Recipe, config: CogVLMConfig, world_size: int) -> list[str]:
    """A line where the estimate exceeds what this device has, else nothing."""
    available, device = available_memory(world_size)
    found = estimate(recipe, gpus=world_size, gpu_memory_gib=available / GIB, device=device)
    way = launch.way_of_sharding()
    plan = next((plan for plan in found.plans if plan.name == way), found.plans[0])
    # Activations are a model of what autograd keeps; refuse only what is clearly too much.
    if 0.9 * plan.total <= available:
        return []
    kind = "GPU" if device == "cuda" else "main"
    where = "" if device == "cuda" else "; no GPU is at hand"
    parts = ", ".join(f"{part} {size / GIB:,.1f}" for part, size in plan.parts.items())
    return [
        f"memory: about {plan.total / GIB:,.0f} GiB of {kind} memory needed per process "
        f"({parts}), {available / GIB:,.1f} GiB available{where}. The model: {found.model}. "
        "See `cogvlm-sft estimate` for more GPUs; fewer trainable groups need less"
    ]


def available_memory(world_size: int = 1) -> tuple[float, str]:
    """Bytes free for one process, and the kind of device ("cuda" or "cpu").

    On the CPU it is what the system or the container's limit leaves, shared by local processes.
    """
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info(own_device())[0]), "cuda"
    free = float(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.stat")
    try:
        ceiling = limit.read_text().strip()
        anonymous = dict(line.split() for line in used.read_text().splitlines())["anon"]
        if ceiling != "max":
            free = min(free, float(ceiling) - float(anonymous))
    except (OSError, KeyError, ValueError):
        pass  # not a control group of the second version: the system's figure stands
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), "cpu"


def processor_for(recipe: Recipe) -> CogVLMProcessor:
    """The processor that the recipe asks for."""
    if recipe.model.checkpoint is not None:
        return load_processor(
            recipe.model.checkpoint, recipe.model.tokenizer, image_size=recipe.model.image_size
        )
    config, _ = model_config(recipe)
    if recipe.model.tokenizer is None:
        raise RecipeError(f"{recipe.source}: model.config needs model.tokenizer")
    return build_processor(config, recipe.model.tokenizer)


def check_output(recipe: Recipe) -> Path | None:
    """Decide how the run starts in its output folder.

    Returns:
        The snapshot to go on from, or None for a start at step 0. Nothing is written.

    Raises:
        RecipeError: the folder holds something else: a finished run, another recipe's run, or
            files that no run wrote.
    """
    output = recipe.train.output
    if not output.exists():
        return None
    if not output.is_dir():
        raise RecipeError(f"{recipe.source}: train.output {output} is a file, expected a folder")
    advice = "choose another train.output, or remove the folder"
    written = output / RECIPE_FILE
    if not written.is_file():
        if any(not is_index(file) for file in output.iterdir()):
            raise RecipeError(
                f"{recipe.source}: train.output {output} holds files that are not of a training "
                f"run; {advice}"
            )
        return None
    if any((output / name).is_file() for name in ("config.json", ADAPTER_CONFIG)):
        raise RecipeError(
            f"{recipe.source}: train.output {output} holds a finished run's checkpoint; {advice}"
        )
    if not snapshots.snapshots(output):
        return None  # stopped before its first snapshot: nothing is lost by starting again
    if recipe.train.resume == "never":
        raise RecipeError(
            f"{recipe.source}: train.output {output} holds snapshots and train.resume is never; "
            f"set it to auto to go on, or {advice}"
        )
    if changed := _changes(written, recipe):
        raise RecipeError(
            f"{recipe.source}: train.output {output} holds snapshots of a run with other "
            f"settings ({'; '.join(changed)}); {advice}"
        )
    found = snapshots.newest_complete(output)
    if found is None:
        if launch.rank() == 0:
            said = f"warning: no snapshot in {output} is complete; starting at step 0"
            print(said, file=sys.stderr)
    elif (problem := _other_launcher(found)) is not None:
        raise RecipeError(f"{recipe.source}: {found} was written by a run {problem}")
    return found


def _other_launcher(snapshot: Path) -> str | None:
    """Why a snapshot cannot be read under this launcher; None where it can."""
    split = any(snapshot.glob("global_step*"))
    if split != launch.under_deepspeed():
        there, here = ("with", "without") if split else ("without", "with")
        return (
            f"{there} DeepSpeed, this one is {here}; go on with the launcher's configuration and "
            "the number of processes that it was started with"
        )
    if launch.under_fsdp() and not is_sharded(snapshot):
        return "without FSDP, this one is with; go on without it (the other way round is possible)"
    return None


def _changes(written: Path, recipe: Recipe) -> list[str]:
    """Keys whose value differs from the recipe that a run was started with."""
    try:
        before = _flat(yaml.safe_load(written.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CheckpointError(f"{written}: cannot be read: {error}") from None
    now = _flat(recipe.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)!r} there, {now.get(key)!r} here"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in _FREE_ON_RESUME
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix.rstrip("."): tree}
    return {k: v for key, value in tree.items() for k, v in _flat(value, f"{prefix}{key}.").items()}
