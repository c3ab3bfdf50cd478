"""Waiting for each other, for processes that share an evaluation."""

import functools
from datetime import timedelta

import torch

from cogvlm_sft import launch

_LONGEST_WAIT = timedelta(days=7)


def wait_for_all() -> None:
    """Until all processes are here, however long that takes; at once where there is one."""
    if launch.world_size() > 1:
        torch.distributed.barrier(_waiting_group())


@functools.cache
def _waiting_group() -> torch.distributed.ProcessGroup:
    """Apart from a training's group: that one's limit of minutes is for a step."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=_LONGEST_WAIT)
    group = torch.distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)
    assert isinstance(group, torch.distributed.ProcessGroup)
    return group
