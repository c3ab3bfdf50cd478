"""Rows of a data set to a batch: right padding, pictures in batch-major order."""

from collections.abc import Sequence
from typing import Any

import torch

from cogvlm_sft.errors import DataError
from cogvlm_sft.model.processing_cogvlm import IGNORE_INDEX, CogVLMProcessor


class CogVLMCollator:
    """Pads items of `ConversationDataset` to the longest of the batch.

    Args:
        processor: Gives the pad id.
    """

    def __init__(self, processor: CogVLMProcessor) -> None:
        self.processor = processor

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Makes one batch.

        Args:
            items: As `ConversationDataset` gives them.

        Returns:
            input_ids, attention_mask, token_type_ids and labels (rows, longest), and pixel_values
            (pictures of the batch, 3, S, S) unless no row has a picture.

        Raises:
            DataError: No label of the batch carries loss, so a step would learn nothing.
        """
        batch = self.processor.pad(items, side="right")
        check_supervised(batch["labels"], len(items))
        pixel_values = torch.cat([item["images"] for item in items])
        if len(pixel_values):
            batch["pixel_values"] = pixel_values
        return batch


def check_supervised(labels: torch.Tensor, conversations: int) -> None:
    """Refuses labels (rows, length) of which none is predicted.

    Raises:
        DataError: No label carries loss, so a step would learn nothing.
    """
    # The label of the first place is never predicted.
    if not bool((labels[:, 1:] != IGNORE_INDEX).any()):
        raise DataError(
            f"a batch of {conversations} row(s) has no supervised token, expected at least one; "
            'check `"train": false` in the data and data.max_length'
        )
