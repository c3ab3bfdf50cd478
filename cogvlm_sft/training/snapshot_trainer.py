"""Saving and resuming: transformers' snapshots, made whole or absent (`snapshots.py`).

What the Trainer writes goes into a hidden folder that is renamed once it is complete, and what it
reads is accounted for to the last tensor: its own loading is not strict. An adapter run keeps what
is trained; FSDP2's shards are read on any number of processes, and without FSDP.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint import CheckpointException
from transformers import Trainer
from trl import SFTTrainer

from cogvlm_sft.checkpoint.processor import save_processor
from cogvlm_sft.checkpoint.sharded import is_sharded, load_sharded_moments, load_sharded_weights
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.training import snapshots
from cogvlm_sft.training.stopping import is_lost_process
from cogvlm_sft.tune.adapters import AdapterFiles, load_adapter

# transformers writes its arguments as a pickle beside the weights; the recipe says the same.
_PICKLED_ARGUMENTS = "training_args.bin"


class SnapshotTrainer(SFTTrainer):
    """TRL's trainer with snapshots that are complete or not there.

    Attributes:
        keep_snapshots: how many complete snapshots stay on the disk.
        adapter: snapshots hold what is trained only, as an adapter; None holds the model.
    """

    keep_snapshots: int
    adapter: AdapterFiles | None
    # Attributes of transformers' Trainer.
    optimizer: Any
    lr_scheduler: Any

    _saving_into: Path | None = None

    def _get_output_dir(self, trial: Any = None) -> str:
        return str(self._saving_into or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a snapshot beside its place and rename it; older ones go only after that.

        Raises:
            CheckpointError: the disk is full or not writable; the last good snapshot stays.
        """
        output, step = Path(self.args.output_dir), self.state.global_step
        staging = snapshots.staging_folder(output)
        main = self.accelerator.is_main_process
        try:
            if main:
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            self._saving_into = staging
            # Trainer's, not SFTTrainer's, which writes a model card into the output first.
            Trainer._save_checkpoint(self, model, trial)
            if main and self.is_fsdp_enabled and self.adapter is None:
                # What makes shards a checkpoint that can be evaluated and talked to.
                self.model.config.save_pretrained(staging / f"checkpoint-{step}")
                save_processor(self.processing_class, staging / f"checkpoint-{step}")
            self.accelerator.wait_for_everyone()
            if main:
                snapshots.publish(
                    staging / f"checkpoint-{step}", snapshots.snapshot_folder(output, step)
                )
                snapshots.rotate(output, self.keep_snapshots, step)
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            if is_lost_process(error):
                raise
            # torch reports a full disk as RuntimeError, safetensors as its own error; what befell
            # one process's shard reaches them all, and is no Exception even.
            cause: BaseException = error
            if isinstance(error, CheckpointException):
                cause = next(iter(error.failures.values()))[0]
            last = [path.name for path in snapshots.snapshots(output)]
            raise CheckpointError(
                f"{output}: the snapshot of step {step} cannot be written "
                f"({shutil.disk_usage(output).free / 1e6:,.0f} MB are free there): {cause}; "
                f"the last one is {last[-1] if last else 'none'}"
            ) from error
        finally:
            self._saving_into = None
            if main:
                shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.adapter is not None and output_dir is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            self.adapter.save(self.model, Path(output_dir), state_dict)
            save_processor(self.processing_class, Path(output_dir))
            return
        super()._save(output_dir, state_dict=state_dict)
        if output_dir is not None:
            save_processor(self.processing_class, Path(output_dir))
            Path(output_dir, _PICKLED_ARGUMENTS).unlink(missing_ok=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif is_sharded(Path(resume_from_checkpoint)):
            load_sharded_weights(self.model, Path(resume_from_checkpoint))
        elif self.adapter is not None:
            load_adapter(self.model, Path(resume_from_checkpoint))
        else:
            snapshots.load_weights(
                self.model if model is None else model, Path(resume_from_checkpoint)
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint and is_sharded(Path(checkpoint)) and not self.is_fsdp_enabled:
            self._load_sharded_moments(Path(checkpoint))
            return
        names = [group.get("name") for group in self.optimizer.param_groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{checkpoint}: its optimizer does not fit: {error}") from error
        loaded = [group.get("name") for group in self.optimizer.param_groups]
        if loaded != names:
            raise CheckpointError(
                f"{checkpoint}: its optimizer has the groups {loaded}, this run has {names}"
            )

    def _load_sharded_moments(self, folder: Path) -> None:
        """Moments from shards, schedule from its file, and the rates that follow from it."""
        load_sharded_moments(self.model, self.optimizer, folder)
        self.lr_scheduler.load_state_dict(
            torch.load(folder / "scheduler.pt", map_location="cpu", weights_only=True)
        )
        rates = self.lr_scheduler.get_last_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
