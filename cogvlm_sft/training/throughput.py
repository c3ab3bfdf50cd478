"""How fast a run is: conversations, tokens and useful operations a second, and memory.

Counting costs no synchronisation: a batch's counts stay on its device and are read at the next log.
Rates are over the time since the last log, saving and measuring included, for all processes.
"""

import re
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

import psutil
import torch
from torch import nn

from cogvlm_sft.model import CogVLMConfig
from cogvlm_sft.model.token_layout import IGNORE_INDEX
from cogvlm_sft.training.flops import Work, training_flops
from cogvlm_sft.tune.groups import group_of, shape_of

_GIB = 2**30

# Dense bf16 tensor-core operations a second by the vendors' data sheets, without sparsity.
_PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "A10": 125e12,
}


class Throughput:
    """Counts what is trained on between two logs, and says how fast that was."""

    def __init__(
        self, config: CogVLMConfig, trained: Collection[str], peak_flops: float, processes: int
    ) -> None:
        """Set up the counters.

        Args:
            config: the model, for its operations.
            trained: parameter groups whose matrices get gradients (see `training_flops`).
            peak_flops: operations a second that one device could do at best (`peak_flops`).
            processes: how many devices train together.
        """
        self.config, self.trained = config, tuple(trained)
        self.peak = peak_flops * processes
        self._counts: torch.Tensor | None = None
        self._since, self._step = 0.0, 0

    def count(self, batch: Mapping[str, Any], step: int) -> None:
        """Add one micro-batch of the collator, on whatever device it is.

        The first one, of the step after `step`, starts the clock.
        """
        if not self._since:
            self._since, self._step = time.monotonic(), step
        types, mask, labels = batch["token_type_ids"], batch["attention_mask"], batch["labels"]
        lengths = mask.sum(dim=-1).double()
        squares = lengths.square()
        if "segments" in batch:
            # Conversations in one row: a branch's tokens see its prefix and, halfway, itself.
            start, end, prefix = batch["segments"].double().unbind(1)
            size = end - start
            seen = torch.where(prefix >= 0, size[batch["segments"][:, 2]], 0.0)
            squares = size.square() + 2 * size * seen
        pixels = batch.get("pixel_values")
        counts = torch.stack(
            [
                lengths.sum(),
                squares.sum(),
                lengths.new_tensor(0 if pixels is None else pixels.shape[0]),
                (labels[..., 1:] != IGNORE_INDEX).sum().double(),
                (types == 1).sum().double(),
            ]
        )
        self._counts = counts if self._counts is None else self._counts + counts

    def window(
        self, step: int, global_batch: int, sum_over_processes: Callable[[torch.Tensor], Any]
    ) -> dict[str, float]:
        """Figures since the last window, which ends it; empty where no step was made.

        `mfu` is the share of the devices' peak that went into operations the step needs:

            mfu = training_flops(all rows of the window) / (seconds x peak x devices)

        with `training_flops` of `training/flops.py`: forward and backward of what learns, nothing
        for recomputation, padding or logits that nobody reads.

        Args:
            step: steps made so far.
            global_batch: conversations of a step.
            sum_over_processes: adds a tensor over all processes; every process calls it.
        """
        if step <= self._step or self._counts is None:
            return {}
        tokens, squares, images, supervised, on_images = sum_over_processes(self._counts).tolist()
        seconds = time.monotonic() - self._since
        work = Work(tokens=tokens, squares=squares, images=images, supervised=supervised)
        figures = {
            "conversations_per_second": (step - self._step) * global_batch / seconds,
            "supervised_tokens_per_second": supervised / seconds,
            "image_tokens_per_second": on_images / seconds,
            "mfu": training_flops(self.config, self.trained, work) / (seconds * self.peak),
            "memory_gib": used_memory() / _GIB,
        }
        self._counts = None
        self._since, self._step = time.monotonic(), step
        return figures


def peak_flops(device: torch.device) -> float:
    """Operations a second that a device could do at best.

    For GPUs in the table it is the data sheet's dense bf16 figure. For others, CPUs above all and
    slices of a GPU (MIG), it is what a square matrix product reaches here and now (some 0.03 s):
    the MFU is then a share of that.
    """
    if device.type == "cuda" and "MIG" not in (name := torch.cuda.get_device_name(device)):
        for key in sorted(_PEAK_BF16, key=len, reverse=True):
            if re.search(rf"\b{key}\b", name):
                return _PEAK_BF16[key]
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    one = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        product = one @ one
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def trained_matrices(model: nn.Module) -> set[str]:
    """Parameter groups of which whole matrices learn; low-rank factors cost next to nothing."""
    return {
        group_of(name)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and len(shape_of(parameter)) >= 2 and ".lora_" not in name
    }


def used_memory() -> float:
    """Bytes: the most that tensors took on this process's GPU, or this process's resident size."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return float(psutil.Process().memory_info().rss)
