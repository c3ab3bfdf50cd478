"""What a finished run leaves: held-out loss, loss curve, run card, checkpoint or adapter."""

from pathlib import Path

from cogvlm_sft.checkpoint.load import save_checkpoint, save_processor
from cogvlm_sft.checkpoint.staging import staged
from cogvlm_sft.model import CogVLMForCausalLM, CogVLMProcessor
from cogvlm_sft.recipe import Recipe
from cogvlm_sft.training.provenance import write_card
from cogvlm_sft.training.row_index import remove_indices
from cogvlm_sft.training.telemetry import METRICS_FILE, SAMPLES_FILE, plot_loss, read_metrics
from cogvlm_sft.training.trainer import CogVLMTrainer
from cogvlm_sft.tune.adapters import AdapterFiles
from cogvlm_sft.tune.naming import ADAPTER_CONFIG

_LOSS_PICTURE = "loss.png"


def finish(
    trainer: CogVLMTrainer,
    model: CogVLMForCausalLM,
    processor: CogVLMProcessor,
    recipe: Recipe,
) -> tuple[float, float | None]:
    """Measure, and write what the run was for; the configuration comes last.

    Args:
        trainer: after its last step; every process calls this, the first one writes.
        model: the trainer's, as it was built.
        processor: written beside the weights.
        recipe: of the run.

    Returns:
        Training loss of the last logged window (nan in other processes than the first), and the
        held-out loss, None without held-out data.

    Raises:
        CheckpointError: the checkpoint cannot be written.
    """
    output = recipe.train.output
    held_out = None
    if trainer.eval_dataset is not None:
        held_out = trainer.held_out()["eval_loss"]
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None
    metrics = output / METRICS_FILE
    final_loss = float("nan")
    if trainer.accelerator.is_main_process:
        losses = [row["loss"] for row in read_metrics(metrics) if "loss" in row]
        final_loss = losses[-1] if losses else final_loss
        plot_loss(metrics, output / _LOSS_PICTURE, Path(recipe.source).stem)
        write_card(recipe, metrics, output / SAMPLES_FILE, _LOSS_PICTURE)
        if (files := adapter_files(recipe)) is None:
            save_checkpoint(model, processor, output, dtype=recipe.model.dtype, state_dict=weights)
        else:
            with staged(output, last=ADAPTER_CONFIG) as folder:
                files.save(model, folder, weights)
                save_processor(processor, folder)
        remove_indices(output)
    trainer.accelerator.wait_for_everyone()
    return final_loss, held_out


def adapter_files(recipe: Recipe) -> AdapterFiles | None:
    """How what is trained is kept apart from the base: with factors, or beside 4-bit weights."""
    if not recipe.writes_adapter:
        return None
    quantize = recipe.model.quantize
    quantized = (quantize.groups, recipe.model.dtype) if quantize else None
    model = recipe.model
    return AdapterFiles(recipe.tune, str(model.checkpoint), quantized, model.image_size)
