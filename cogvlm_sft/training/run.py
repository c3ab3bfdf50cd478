"""One call from a recipe to a checkpoint: check, load, train, write.

The order is by cost: the recipe, the output folder, paths and memory, every record of the data, and
only then the weights. What the run writes: `recipe.yaml` (resolved), `run.json` (versions, digests
of the data), `metrics.jsonl`, `samples.jsonl`, `snapshots/`, and at the end the checkpoint in the
released layout with tokenizer and processor, `loss.png`, and the run card `README.md`. A run that
is stopped or fails leaves no checkpoint that could be taken for a finished one.
"""

import errno
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import gather_object
from transformers import set_seed

from cogvlm_sft import launch
from cogvlm_sft.checkpoint.load import (
    build_model,
    load_model,
    own_device,
    stored_weights,
)
from cogvlm_sft.checkpoint.staging import write_text
from cogvlm_sft.data.collator import CogVLMCollator
from cogvlm_sft.data.mixture import ConversationDataset
from cogvlm_sft.data.packing import SharedImageCollator
from cogvlm_sft.errors import CheckpointError, TrainingError
from cogvlm_sft.model import CogVLMForCausalLM
from cogvlm_sft.recipe import Recipe
from cogvlm_sft.training import snapshots
from cogvlm_sft.training.arguments import training_arguments
from cogvlm_sft.training.finish import adapter_files, finish
from cogvlm_sft.training.preflight import (
    RECIPE_FILE,
    check_output,
    check_ready,
    processor_for,
)
from cogvlm_sft.training.provenance import check_same_data, write_run_file
from cogvlm_sft.training.row_index import dataset_of
from cogvlm_sft.training.samplers import GlobalBatchSampler, batches_of
from cogvlm_sft.training.samples import PromptSamples, check_prompts
from cogvlm_sft.training.services import service_run
from cogvlm_sft.training.stopping import StopOnSignal, TrainingStopped, is_lost_process
from cogvlm_sft.training.surroundings import deterministic, fresh_output, quiet
from cogvlm_sft.training.telemetry import (
    METRICS_FILE,
    SAMPLES_FILE,
    LogWindows,
    MetricsFile,
    Progress,
)
from cogvlm_sft.training.trainer import CogVLMTrainer
from cogvlm_sft.tune.adapters import apply_tuning
from cogvlm_sft.tune.groups import GroupSummary, group_table, summarize_groups

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """A finished run.

    Attributes:
        output: folder of the checkpoint.
        steps: optimizer steps of the whole run, those before a resume included.
        final_loss: training loss of the last logged window.
        held_out_loss: on data.validation after the last step; None without one.
        seconds: wall-clock of this call.
    """

    output: Path
    steps: int
    final_loss: float
    held_out_loss: float | None
    seconds: float


def train(recipe: Recipe) -> TrainResult:
    """Train by a recipe, going on from the newest complete snapshot where there is one.

    Every process of a distributed launch calls this; the first one writes.

    Raises:
        RecipeError: the recipe cannot run here, or its output folder is taken.
        DataError: a conversation or picture is unusable.
        CheckpointError: weights are damaged, or a snapshot cannot be written.
        TrainingError: another process of the run is gone.
        TrainingStopped: SIGTERM or SIGINT; a snapshot was saved. It exits with 128 + the signal.
    """
    started = time.monotonic()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    world_size, first = launch.world_size(), launch.rank() == 0
    recipe.accumulation_steps(world_size)
    resume_from = check_output(recipe)
    check_ready(recipe, world_size)
    if resume_from is not None:
        check_same_data(recipe)
    processor = processor_for(recipe)
    if recipe.evaluate is not None:
        check_prompts(recipe.evaluate.prompts, processor, recipe.data.image_root)
    with deterministic(), quiet(), fresh_output(recipe.train.output, first):
        sources = [(source.path, source.weight) for source in recipe.data.train]
        dataset = dataset_of(recipe, processor, "train", sources)
        held_out = None
        if recipe.data.validation is not None:
            sources = [(recipe.data.validation, 1.0)]
            held_out = dataset_of(recipe, processor, "validation", sources)
        set_seed(recipe.train.seed)
        # transformers splits weights under ZeRO-3 as soon as it knows the arguments. Those that are
        # read are split as they come; fresh ones must be drawn whole, or they would be other ones.
        fresh = None if recipe.model.checkpoint else _fresh_model(recipe)
        arguments = training_arguments(recipe, world_size)
        model = fresh or _read_model(recipe)
        weights = None
        if model.device.type == "meta":
            weights = stored_weights(recipe.model.checkpoint or Path(), recipe.model.image_size)
        rates = recipe.tune.trainable()
        apply_tuning(model, recipe.tune)
        _hold_frozen(model, getattr(torch, recipe.model.dtype))
        model.recompute_mlp(recipe.train.gradient_checkpointing == "mlp")
        if recipe.train.compile:
            model.compile_layers()
        batches = batches_of(recipe, dataset, processor.num_image_tokens, world_size)
        if first:
            groups = summarize_groups(model, learning_rate=recipe.train.learning_rate, rates=rates)
            _announce(recipe, groups, dataset, batches, resume_from)
            _write_recipe(recipe)
            if resume_from is None:
                write_run_file(recipe, groups)
            snapshots.remove_leftovers(recipe.train.output)
        stop, progress = StopOnSignal(), Progress()
        callbacks = [
            stop,
            LogWindows(),
            progress,
            MetricsFile(recipe.train.output / METRICS_FILE),
        ]
        if recipe.evaluate is not None and recipe.evaluate.prompts:
            file = recipe.train.output / SAMPLES_FILE
            root = recipe.data.image_root
            callbacks.append(PromptSamples(file, processor, root, recipe.evaluate))
        trainer = CogVLMTrainer(
            model,
            processor,
            arguments,
            train_dataset=dataset,
            eval_dataset=held_out,
            collator=SharedImageCollator(processor)
            if recipe.data.share_images
            else CogVLMCollator(processor),
            eval_collator=CogVLMCollator(processor),
            batches=batches,
            rates=rates,
            callbacks=callbacks,
            keep_snapshots=recipe.train.keep_snapshots,
            adapter=adapter_files(recipe),
            weights=weights,
        )
        _agree(resume_from)
        with service_run(arguments, recipe, first=first, resumed=resume_from is not None):
            _train_to_the_end(trainer, recipe, resume_from, stop, progress)
            final_loss, held_out_loss = finish(trainer, model, processor, recipe)
    return TrainResult(
        output=recipe.train.output,
        steps=recipe.train.iterations,
        final_loss=final_loss,
        held_out_loss=held_out_loss,
        seconds=time.monotonic() - started,
    )


def _train_to_the_end(
    trainer: CogVLMTrainer,
    recipe: Recipe,
    resume_from: Path | None,
    stop: StopOnSignal,
    progress: Progress,
) -> None:
    """Every step, or one clear word why not.

    Raises:
        TrainingError: another process is gone.
        CheckpointError: the disk is full or not writable.
        TrainingStopped: a signal was obeyed.
    """
    output = recipe.train.output
    try:
        trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    except RuntimeError as error:
        if launch.world_size() == 1 or not is_lost_process(error):
            raise
        raise TrainingError(
            f"another process of this run is gone, so process {launch.rank()} stops too "
            f"({str(error).splitlines()[0]}); the same command goes on {_from_where(output)}"
        ) from error
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise CheckpointError(
            f"{output}: cannot be written: {error.strerror}; with more room the same command goes "
            f"on {_from_where(output)}"
        ) from error
    else:
        progress.close()
        step = trainer.state.global_step
        if step < recipe.train.iterations:
            snapshot = snapshots.snapshot_folder(output, step)
            # Said before the signals are given back: a launcher ends the others with the first.
            if launch.rank() == 0:
                print(
                    f"stopped after step {step}; the same command goes on from {snapshot}",
                    file=sys.stderr,
                )
            raise TrainingStopped(stop.received or 0, step, snapshot)
    finally:
        stop.restore()
        progress.close()


def _from_where(output: Path) -> str:
    last = snapshots.newest_complete(output)
    return f"from {last}" if last else "from its start, since no snapshot was written yet"


def _agree(resume_from: Path | None) -> None:
    """All processes start at the same step.

    Raises:
        CheckpointError: they do not see the same snapshots.
    """
    own = snapshots.snapshot_step(resume_from) if resume_from else 0
    steps: list[int] = gather_object([own])
    if len(set(steps)) > 1:
        raise CheckpointError(
            f"the processes would go on from different snapshots (steps {steps}); train.output "
            "must be one folder that all machines see"
        )


def _fresh_model(recipe: Recipe) -> CogVLMForCausalLM:
    return build_model(recipe.model.config or {}, attention=recipe.model.attention)


def _read_model(recipe: Recipe) -> CogVLMForCausalLM:
    """The checkpoint, on the device that this process trains on.

    Where FSDP2 will split it, nothing is read before; adapters are made beside whole weights.
    """
    section = recipe.model
    split_first = launch.under_fsdp() and not recipe.writes_adapter
    return load_model(
        section.checkpoint or Path(),
        dtype=section.dtype,
        attention=section.attention,
        quantize=section.quantize.groups if section.quantize else (),
        image_size=section.image_size,
        device="meta" if split_first else own_device(),
    )


def _hold_frozen(model: CogVLMForCausalLM, dtype: torch.dtype) -> None:
    """Fresh weights are drawn in fp32; what will not learn is held in the recipe's dtype."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():  # 4-bit ones are not
            parameter.data = parameter.data.to(dtype)


def _announce(
    recipe: Recipe,
    groups: Sequence[GroupSummary],
    dataset: ConversationDataset,
    batches: GlobalBatchSampler,
    resume_from: Path | None,
) -> None:
    """The start-up table and what the run is about to do."""
    train = recipe.train
    print(group_table(groups))
    print(f"\n{dataset.report}, the longest of {max(dataset.lengths):,} tokens")
    print(f"{batches.report()}\n")
    print(
        f"run: {train.iterations:,} steps of {train.global_batch_size} conversations into "
        f"{train.output}, "
        + (f"going on from {resume_from.name}" if resume_from else "from step 0"),
        flush=True,
    )


def _write_recipe(recipe: Recipe) -> None:
    """The resolved recipe, written beside and renamed; a resumed run has it already."""
    file = recipe.train.output / RECIPE_FILE
    write_text(file, f"# resolved from {recipe.source}\n{recipe.to_yaml()}")
