"""The highest resident size of a process while FSDP2 splits a checkpoint and its part is read.

    torchrun --nproc_per_node=2 tests/training/split_memory.py RECIPE

Prints, for each process, bytes above what was resident before, and bytes of its part; then it ends.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from cogvlm_sft.training import run
from cogvlm_sft.training.trainer import CogVLMTrainer


def resident(field: str) -> int:
    """`VmRSS` now, or `VmHWM` at most, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


before = 0
read_model, prepare = run._read_model, CogVLMTrainer._prepare_for_training


def watch_reading(recipe: Any) -> Any:
    global before
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    before = resident("VmRSS")
    return read_model(recipe)


def end_when_prepared(self: CogVLMTrainer, *arguments: Any) -> Any:
    prepared = prepare(self, *arguments)
    part = sum(p.to_local().nbytes for p in prepared[0].parameters())
    print(f"{resident('VmHWM') - before} {part}", flush=True)
    os._exit(0)


run._read_model = watch_reading
CogVLMTrainer._prepare_for_training = end_when_prepared  # type: ignore[method-assign]
sys.argv = ["sharded_on_cpu.py", "fsdp2", sys.argv[1]]
runpy.run_path(str(Path(__file__).with_name("sharded_on_cpu.py")), run_name="__main__")
