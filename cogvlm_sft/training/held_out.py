"""Held-out loss and accuracy of a batch, from one pass that makes logits where they are read."""

from typing import Any

import torch
from torch import nn

from cogvlm_sft.model.token_layout import IGNORE_INDEX


def held_out_sums(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """Loss, right tokens, tokens, right rows and rows of a batch, (5,) of float64."""
    inputs = dict(inputs)
    targets = inputs.pop("labels")[:, 1:]
    supervised = targets != IGNORE_INDEX
    # The columns where some row is supervised; logits of no others are made.
    columns = supervised.any(dim=0).nonzero().squeeze(1)
    logits = model(**inputs, use_cache=False, logits_to_keep=columns).logits.float()
    targets, supervised = targets[:, columns], supervised[:, columns]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    right = (logits.argmax(dim=-1) == targets) & supervised
    whole = (right | ~supervised).all(dim=1)
    counts = (loss, right.sum(), supervised.sum(), whole.sum(), targets.new_tensor(len(targets)))
    return torch.stack([count.double() for count in counts])
