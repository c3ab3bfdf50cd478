"""What a run changes in its process and in the file system, and puts back."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from cogvlm_sft.training.telemetry import METRICS_FILE


@contextlib.contextmanager
def fresh_output(output: Path, first: bool) -> Iterator[None]:
    """A run that fails before its first logged step takes its own output folder away again.

    Later, what it logged is what a reader needs to see why.
    """
    existed = output.exists()
    try:
        yield
    except BaseException:
        if first and not (existed or (output / METRICS_FILE).is_file()):
            shutil.rmtree(output, ignore_errors=True)
        raise


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Only our own progress bar: transformers would draw one per weight file it reads or writes."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """The same seed gives the same weights, bit for bit, on a CPU.

    On a GPU deterministic kernels cost speed and some do not exist, so there the order of the data
    and the initial weights are the same, and sums agree up to rounding.
    """
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if not torch.cuda.is_available():
        torch.use_deterministic_algorithms(True)
        # Filling fresh memory only serves to find bugs, and costs a pass over every tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
