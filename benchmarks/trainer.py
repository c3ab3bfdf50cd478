"""A `CogVLMTrainer` around a benchmark's model, so that what is timed is a step of training."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from benchmarks.models import processor_for
from cogvlm_sft.data.packing import SharedImageCollator
from cogvlm_sft.model import CogVLMForCausalLM
from cogvlm_sft.recipe import recipe_from_dict
from cogvlm_sft.training.arguments import training_arguments
from cogvlm_sft.training.samplers import GlobalBatchSampler
from cogvlm_sft.training.trainer import CogVLMTrainer


def trainer_for(model: CogVLMForCausalLM) -> CogVLMTrainer:
    """Set up as `cogvlm_sft.training.run` does, with the tower frozen; its data are never read."""
    processor = processor_for(model.config)
    with tempfile.TemporaryDirectory() as folder:  # nothing is saved
        recipe = recipe_from_dict(
            {
                "model": {"config": {}, "tokenizer": folder, "dtype": "float32"},
                "data": {"train": [{"path": folder}], "image_root": folder},
                "tune": {"vision_tower": {"mode": "frozen"}},
                "train": {"output": folder, "iterations": 1000, "global_batch_size": 1,
                          "learning_rate": 1e-5},
            },
            "benchmark",
        )  # fmt: skip
        trainer = CogVLMTrainer(
            model,
            processor,
            training_arguments(recipe, 1),
            train_dataset=[None],  # type: ignore[arg-type]
            collator=SharedImageCollator(processor),
            batches=GlobalBatchSampler([1], [-1], steps=1, global_batch=1, micro_batches=1),
            rates=recipe.tune.trainable(),
        )
    trainer.create_optimizer()
    return trainer


def step(trainer: CogVLMTrainer, batch: dict[str, torch.Tensor]) -> Any:
    """Forward and backward by `training_step`, gradients dropped first as in the training loop."""
    trainer.model.zero_grad(set_to_none=True)
    supervised = (batch["labels"][:, 1:] != -100).sum()
    return trainer.training_step(trainer.model, dict(batch), supervised)
