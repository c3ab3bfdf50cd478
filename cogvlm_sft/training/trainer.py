"""`CogVLMTrainer`: TRL's SFTTrainer, with what a CogVLM run needs and nothing else.

What it adds: a learning rate per parameter group, fp32 trainable weights, the loss at supervised
positions only, a sampler that runs across epoch ends, and snapshots that are whole or absent
(`snapshot_trainer.py`). Model, processor, dataset and collator come as objects. TRL 1.16 wants a
`datasets.Dataset` and prepares it; ours is a torch dataset that encodes on demand, so TRL is shown
one placeholder row and the real dataset is put in its place. TRL also patches `model.forward` with
a fused head; the patch hands every call without `fused_lm_head` to the class's own forward, and
`compute_loss` here never passes it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from cogvlm_sft.checkpoint.fill import StoredWeights, fill
from cogvlm_sft.errors import RecipeError
from cogvlm_sft.model import CogVLMForCausalLM, CogVLMProcessor
from cogvlm_sft.training import snapshots
from cogvlm_sft.training.held_out import held_out_sums
from cogvlm_sft.training.optimization import (
    fp32_masters,
    hold_trainable_in_fp32,
    make_optimizer,
    rate_schedule,
)
from cogvlm_sft.training.snapshot_trainer import SnapshotTrainer
from cogvlm_sft.training.stopping import leave_process_group
from cogvlm_sft.training.throughput import Throughput, peak_flops, trained_matrices
from cogvlm_sft.tune.adapters import AdapterFiles
from cogvlm_sft.tune.groups import parameter_groups


def _reduce_in_fp32(accelerator: Accelerator) -> None:
    """FSDP2 computes in bf16; accelerate would also reduce gradients and round the loss to it.

    The layers' rotary angles stay fp32, as without FSDP; pictures are cast by the model.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version == 2 and accelerator.mixed_precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )


class CogVLMTrainer(SnapshotTrainer):
    """Fine-tuning of a CogVLM by a recipe's groups, rates and schedule."""

    # Attributes of transformers' Trainer that are set here too.
    data_collator: Any
    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        model: CogVLMForCausalLM,
        processor: CogVLMProcessor,
        args: SFTConfig,
        *,
        train_dataset: Dataset[Any],
        collator: Callable[[list[Any]], Mapping[str, Any]],
        batches: Sampler[list[int]],
        rates: Mapping[str, float],
        eval_dataset: Dataset[Any] | None = None,
        eval_collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        keep_snapshots: int = 2,
        adapter: AdapterFiles | None = None,
        weights: StoredWeights | None = None,
    ) -> None:
        """Set up a run.

        Args:
            model: frozen parts have `requires_grad=False` already (`tune.set_trainable`).
            processor: saved with every snapshot.
            args: see `training_arguments`.
            train_dataset: map-style, one encoded conversation an item.
            collator: list of items to a batch with `labels`.
            batches: conversations of every micro-batch of the run (`samplers.py`).
            rates: multiple of `args.learning_rate` for each trainable parameter group.
            eval_dataset: held-out conversations for `evaluate`.
            eval_collator: one row a conversation, for `eval_dataset`; None: the same collator.
            callbacks: progress, metrics, signals.
            keep_snapshots: how many complete snapshots stay on the disk.
            adapter: snapshots hold what is trained only, as an adapter; None holds the model.
            weights: of a model without storage, which FSDP2 splits before they are read.
        """
        hold_trainable_in_fp32(model)
        masters = fp32_masters(model)
        placeholder = datasets.Dataset.from_dict({"images": [[""]]})
        super().__init__(
            model=model,
            args=args,
            data_collator=collator,
            train_dataset=placeholder,
            eval_dataset=None if eval_dataset is None else placeholder,
            processing_class=processor,
            callbacks=list(callbacks),
        )
        self.remove_callback(PrinterCallback)
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.batches = batches
        self.eval_collator = eval_collator or collator
        self.rates = dict(rates)
        self.keep_snapshots = keep_snapshots
        self.adapter = adapter
        self.weights = weights
        # The model divides its summed loss by what we pass; transformers would guess it from the
        # class's signature.
        self.model_accepts_loss_kwargs = True
        self._rates_of_step: dict[str, float] = {}
        self._measured: tuple[int, dict[str, float]] = (-1, {})  # a step's held-out figures
        self.throughput = Throughput(
            model.config,
            trained_matrices(model),
            peak_flops(self.args.device),
            self.accelerator.num_processes,
        )
        for name, weight in masters.items():
            model.get_parameter(name).data = weight
        _reduce_in_fp32(self.accelerator)

    def _send_telemetry(self) -> None:
        """TRL reports each run to its authors; we do not."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of the run's sampler, dealt over the processes, read and decoded ahead."""
        return self._loader(
            self.train_dataset, self.data_collator, even_batches=False, batch_sampler=self.batches
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Held-out conversations in their order, one row each."""
        return self._loader(
            self.eval_dataset if eval_dataset is None else eval_dataset,
            self.eval_collator,
            even_batches=True,
            batch_size=self.args.eval_batch_size,
        )

    def _loader(
        self, dataset: Any, collator: Any, *, even_batches: bool, **batches: Any
    ) -> DataLoader[Any]:
        """Not Trainer's way, which wants micro-batches of one size."""
        args = self.args
        loader = DataLoader(
            dataset,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            worker_init_fn=leave_process_group,
            **batches,
        )
        return prepare_data_loader(
            loader,
            device=args.device,
            num_processes=args.world_size,
            process_index=args.process_index,
            put_on_device=True,
            even_batches=even_batches,
            non_blocking=args.dataloader_pin_memory,
        )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over group x decay."""
        if self.optimizer is None:
            args = self.args
            groups = parameter_groups(
                self.model if model is None else model,
                learning_rate=args.learning_rate,
                rates=self.rates,
                weight_decay=args.weight_decay,
            )
            self.optimizer = make_optimizer(groups, args)
        return self.optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Linear warm-up, then cosine to zero or constant; the ratio of the groups never changes.

        The first step has 1/warm-up of the rate, not 0 as in transformers' schedules, where it
        trains nothing.
        """
        if self.lr_scheduler is None:
            factor = rate_schedule(
                str(self.args.lr_scheduler_type.value),
                self.args.get_warmup_steps(num_training_steps),
                num_training_steps,
            )
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer, factor
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: DataLoader[Any], resume_from_checkpoint: str | None
    ) -> tuple[nn.Module, DataLoader[Any]]:
        if self.weights is not None:
            # Addresses without memory behind them: accelerate tells parameters apart by these.
            self.model.to_empty(device="cpu")
        prepared = super()._prepare_for_training(
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if self.weights is not None and resume_from_checkpoint is None:
            fill(prepared[0], self.weights)
        if self.is_fsdp_enabled:
            # transformers' own mark, which accelerate does not set: `generate` then goes on in
            # every process until the last is done, as a split model needs.
            self.model._is_fsdp_managed_module = True
        return prepared

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Summed loss over supervised positions / supervised tokens of the global batch.

        Args:
            model: wrapped for the devices in use.
            inputs: a batch of the collator.
            return_outputs: also return the model's output (its logits are None).
            num_items_in_batch: supervised tokens over all micro-batches and processes of the step;
                None takes the mean over this batch.
        """
        outputs = model(
            **inputs,
            use_cache=False,
            supervised_only=True,
            num_items_in_batch=num_items_in_batch,
        )
        loss = outputs.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The data-parallel wrapper averages gradients over processes; ours is already a mean.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    # Compiled layers are for the shapes of training: eight graphs more would end the run.
    @torch.compiler.set_stance("force_eager")
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Held-out figures.

        Returns:
            `eval_loss`, the mean over all supervised tokens; `eval_token_accuracy`, the share of
            them that are the model's first choice; `eval_accuracy`, the share of conversations of
            which all are: greedy decoding would give those answers word for word. With several
            processes the last batches are filled up with repeated conversations.
        """
        was_training = self.model.training
        model = self.model_wrapped
        model.eval()
        sums = torch.zeros(5, dtype=torch.float64, device=self.args.device)
        for batch in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                sums += held_out_sums(model, inputs)
        loss, right, tokens, rows_right, rows = self.accelerator.reduce(sums, "sum").tolist()
        model.train(was_training)
        metrics = {
            f"{metric_key_prefix}_loss": loss / max(tokens, 1),
            f"{metric_key_prefix}_token_accuracy": right / max(tokens, 1),
            f"{metric_key_prefix}_accuracy": rows_right / max(rows, 1),
        }
        self.log(dict(metrics))
        self._measured = (self.state.global_step, metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def held_out(self) -> dict[str, float]:
        """The held-out figures of this step, measured now unless they were already."""
        step, metrics = self._measured
        return metrics if step == self.state.global_step else self.evaluate()

    def _get_learning_rate(self) -> float:
        # Called between the optimizer's step and the scheduler's: these are the rates of the step.
        self._rates_of_step = {
            group["group"]: group["lr"] for group in self.optimizer.param_groups if "group" in group
        }
        return super()._get_learning_rate()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add each group's rate and the speed since the last log to a training step's figures.

        Raises:
            RecipeError: the loss, or the gradient that the weights were just moved by, is no longer
                a number, so every further step would be lost. A step is logged before it is saved.
        """
        if "loss" in logs:
            if not math.isfinite(logs["loss"] + logs.get("grad_norm", 0.0)):
                output = Path(self.args.output_dir)
                last = snapshots.newest_complete(output)
                raise RecipeError(
                    f"the loss is {logs['loss']}, its gradient's norm {logs.get('grad_norm')}, at "
                    f"step {self.state.global_step}; expected finite numbers. Lower "
                    f"train.learning_rate ({self.args.learning_rate:g}) or lengthen "
                    "train.warmup_iterations, and start again; "
                    + (f"the last snapshot is {last}" if last else "no snapshot was written yet")
                )
            logs |= {f"lr/{group}": rate for group, rate in self._rates_of_step.items()}
            logs |= self.throughput.window(
                self.state.global_step,
                self.get_total_train_batch_size(self.args),
                self.accelerator.reduce,
            )
        super().log(logs, start_time)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """As Trainer's; the batch is counted for the speed figures."""
        self.throughput.count(inputs, self.state.global_step)
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss
