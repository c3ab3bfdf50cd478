"""The recipe's `train` section in TRL's words; the only place that knows both vocabularies."""

import os
from dataclasses import fields

import torch
from trl import SFTConfig

from cogvlm_sft.launch import under_fsdp
from cogvlm_sft.recipe import Recipe


def training_arguments(recipe: Recipe, world_size: int) -> SFTConfig:
    """The recipe's `train` section in TRL's words."""
    train = recipe.train
    cuda = torch.cuda.is_available()
    every = recipe.evaluate.every if recipe.evaluate else None
    measured = every is not None and recipe.data.validation is not None
    return SFTConfig(
        output_dir=os.fspath(train.output),
        max_steps=train.iterations,
        per_device_train_batch_size=train.micro_batch_size,
        gradient_accumulation_steps=recipe.accumulation_steps(world_size),
        optim="adamw_torch_fused" if train.optimizer == "adamw" else train.optimizer,
        learning_rate=train.learning_rate,
        lr_scheduler_type="cosine" if train.schedule == "cosine" else "constant_with_warmup",
        warmup_steps=train.warmup_iterations,
        weight_decay=train.weight_decay,
        adam_beta1=train.betas[0],
        adam_beta2=train.betas[1],
        adam_epsilon=train.epsilon,
        max_grad_norm=train.max_grad_norm or 0.0,
        seed=train.seed,
        data_seed=train.seed,
        save_strategy="steps",
        save_steps=train.save_every,
        logging_steps=train.log_every,
        logging_first_step=True,
        # A loss that is not a number must be seen, not replaced by an average.
        logging_nan_inf_filter=False,
        report_to=train.report_to,
        bf16=recipe.model.dtype == "bfloat16",
        use_cpu=not cuda,
        dataloader_num_workers=recipe.data.workers,
        dataloader_pin_memory=cuda,
        per_device_eval_batch_size=recipe.evaluate.batch_size if recipe.evaluate else 8,
        eval_strategy="steps" if measured else "no",
        eval_steps=every if measured else None,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        # Else every GPU would hold gradients of the whole model between micro-batches.
        accelerator_config={"gradient_accumulation_kwargs": {"sync_each_batch": under_fsdp()}},
        # Every part runs for every batch, also one without images (design of the model).
        ddp_find_unused_parameters=False,
        disable_tqdm=True,
        **_checkpointing(train.gradient_checkpointing is True),
    )


def _checkpointing(enabled: bool) -> dict[str, bool | None]:
    """transformers 5.23 calls it activation checkpointing; TRL sets the old name by default."""
    if "activation_checkpointing" in {field.name for field in fields(SFTConfig)}:
        return {"activation_checkpointing": enabled, "gradient_checkpointing": None}
    return {"gradient_checkpointing": enabled}
