"""Weights read into a model that stands empty: whole, or only the part that this process holds.

Tensors are read one by one, so that beside what stays in memory there is never more than one of
them. Where FSDP2 has split the model, each process reads its own rows of each tensor; where ZeRO-3
has, the first process reads and DeepSpeed deals out. `from_pretrained` keeps every file mapped
until its last tensor is cast, which in another dtype than the files' is all of them on top of the
model; accelerate splits only what stands whole in the memory of one process at least.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as distributed
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from cogvlm_sft.checkpoint.positions import POSITION_EMBEDDING, interpolate_positions
from cogvlm_sft.checkpoint.weights import Header, read_tensor
from cogvlm_sft.model import CogVLMConfig
from cogvlm_sft.model.attention_cogvlm import inverse_frequencies


@dataclass(frozen=True, slots=True)
class StoredWeights:
    """The tensors of a checkpoint folder, read when a model wants them.

    Attributes:
        config: the model's; its picture size may differ from that of the files.
        headers: of every tensor in the files, checked against the configuration.
    """

    config: CogVLMConfig
    headers: Mapping[str, Header]

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """A tensor in memory of its own, or some of its rows, in the dtype of the files.

        Args:
            name: of a parameter or buffer.
            rows: along the first dimension.
        """
        if name not in self.headers:  # the one kind of tensor that files may leave out
            return inverse_frequencies(self.config)
        header, vision = self.headers[name], self.config.vision_config
        if name == POSITION_EMBEDDING and header.shape[0] != vision.num_positions:
            return interpolate_positions(read_tensor(name, header), vision.grid)[rows]
        return read_tensor(name, header, rows=rows)


def fill(model: nn.Module, stored: StoredWeights) -> None:
    """Overwrite every parameter and buffer of a model, each in its own dtype and place.

    Args:
        model: whole, split by FSDP2, or built under ZeRO-3.
        stored: where the values are; every process of a split model calls this.
    """
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if hasattr(tensor, "ds_id"):
            _fill_gathered(tensor, name, stored)
            continue
        rows = slice(None)
        if isinstance(tensor, DTensor):
            shape, offset = compute_local_shape_and_global_offset(
                tensor.shape, tensor.device_mesh, tensor.placements
            )
            tensor, rows = tensor.to_local(), slice(offset[0], offset[0] + shape[0])
        if tensor.numel():  # a tensor of fewer rows than processes has none for some
            tensor.detach().copy_(stored.read(name, rows))


def _fill_gathered(parameter: Any, name: str, stored: StoredWeights) -> None:
    """ZeRO-3: made whole for a moment, written by the first process, and split again."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if distributed.get_rank() == 0:
            parameter.detach().copy_(stored.read(name))


__all__ = ["StoredWeights", "fill"]
