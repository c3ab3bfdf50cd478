"""Conversations about one picture share it: one prefix, and a branch for each conversation.

Attention is causal and the picture comes first, so its hidden states do not depend on what follows:
k conversations about one picture are computed as one prefix (BOS, boi, patches) and k branches,
each from its own eoi on, for one pass over the picture instead of k. Loss and gradients are those
of the k separate rows. A micro-batch is one row of groups that do not see each other, without
padding; `segments` tells the model who sees whom (`cogvlm_sft/model/segments.py`). A conversation
that does not begin with a picture is a group of its own.
"""

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from cogvlm_sft.data.collator import check_supervised
from cogvlm_sft.errors import DataError
from cogvlm_sft.model.processing_cogvlm import CogVLMProcessor
from cogvlm_sft.model.token_layout import build_position_ids


class SharedImageCollator:
    """Packs the items of a micro-batch into one row, each leading picture once.

    Args:
        processor: Says how many tokens a picture takes.
    """

    def __init__(self, processor: CogVLMProcessor) -> None:
        # BOS, boi and the patches: as many as a picture's block, whose eoi is the branches'.
        self.prefix = processor.num_image_tokens

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Makes one row.

        Args:
            items: As `ConversationDataset` gives them, in any order.

        Returns:
            input_ids, attention_mask (of ones), token_type_ids, position_ids and labels, each
            (1, tokens); segments (segments, 3): start, end, number of its prefix or -1; and
            pixel_values (pictures, 3, S, S) unless no item has a picture.

        Raises:
            DataError: No label carries loss, so a step would learn nothing.
        """
        row = _Row()
        for group in self._groups(items):
            if len(group) == 1:
                row.add(group[0], 0, None, -1)
                row.pictures.append(group[0]["images"])
                continue
            prefix = row.add(group[0], 0, self.prefix, -1)
            row.pictures.append(group[0]["images"][:1])
            # Longer branches first: equal ones stand together and are computed together.
            for item in sorted(group, key=lambda item: -len(item["input_ids"])):
                row.add(item, self.prefix, None, prefix)
                row.pictures.append(item["images"][1:])
        batch = row.tensors()
        check_supervised(batch["labels"], len(items))
        return batch

    def _groups(self, items: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        groups: dict[object, list[dict[str, Any]]] = {}
        for number, item in enumerate(items):
            leads = len(item["pictures"]) > 0 and item["token_type_ids"][1] == 1
            groups.setdefault(item["pictures"][0] if leads else number, []).append(item)
        return list(groups.values())


class _Row:
    """A row that grows."""

    def __init__(self) -> None:
        self.columns: dict[str, list[int]] = {
            name: [] for name in ("input_ids", "token_type_ids", "position_ids", "labels")
        }
        self.segments: list[tuple[int, int, int]] = []
        self.pictures: list[torch.Tensor] = []

    def add(self, item: dict[str, Any], start: int, end: int | None, prefix: int) -> int:
        """Appends an item's tokens [start, end) as a segment; returns its number."""
        types = torch.tensor([item["token_type_ids"]])
        tokens = {
            **{name: item[name] for name in ("input_ids", "token_type_ids", "labels")},
            "position_ids": build_position_ids(types)[0].tolist(),
        }
        at = len(self.columns["input_ids"])
        for name, column in self.columns.items():
            column += tokens[name][start:end]
        if prefix >= 0 and at != self.segments[prefix][1]:
            # The picture's block ends with the first branch's eoi; the model knows the others by
            # their place.
            self.columns["token_type_ids"][at] = 0
        self.segments.append((at, len(self.columns["input_ids"]), prefix))
        return len(self.segments) - 1

    def tensors(self) -> dict[str, torch.Tensor]:
        batch = {name: torch.tensor([column]) for name, column in self.columns.items()}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["segments"] = torch.tensor(self.segments)
        pixel_values = torch.cat(self.pictures)
        if len(pixel_values):
            batch["pixel_values"] = pixel_values
        return batch


class Unit(NamedTuple):
    """Conversations that stand in one micro-batch together.

    Attributes:
        numbers: of the conversations in the data set.
        tokens: computed for them, a shared picture once.
        prefix: tokens of the shared picture, 0 without one.
    """

    numbers: tuple[int, ...]
    tokens: int
    prefix: int


def make_units(
    numbers: Sequence[int], lengths: Sequence[int], pictures: Sequence[int], prefix: int
) -> list[Unit]:
    """Groups the conversations of a step by picture.

    Args:
        numbers: of the step's conversations.
        lengths: tokens of every conversation of the data set.
        pictures: number of the picture that each begins with, -1 without.
        prefix: tokens that conversations about one picture share.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for number in numbers:
        picture = pictures[number]
        # A negative key would join conversations without a picture.
        groups.setdefault((picture, -1 if picture >= 0 else number), []).append(number)
    return [
        _unit(members, lengths, prefix if pictures[members[0]] >= 0 else 0)
        for members in groups.values()
    ]


def balance(units: Sequence[Unit], lengths: Sequence[int], rows: int, budget: int) -> list[Unit]:
    """Spreads the units of a step over rows of about equal cost.

    The largest unit goes to the row with the fewest tokens, and so on. A unit that is larger than a
    row's fair share is cut first, and so is the largest one while there are fewer units than rows;
    each cut costs the picture once more.

    Args:
        units: of the step.
        lengths: tokens of every conversation of the data set.
        rows: micro-batches of the step, over all processes.
        budget: most tokens of a row.

    Returns:
        The rows as units without a prefix of their own, most tokens first. A row may be over the
        budget: it is for the caller to say so.
    """
    fair = -(-sum(unit.tokens for unit in units) // rows)
    pieces: list[Unit] = []
    for unit in units:
        pieces += _cut(unit, lengths, min(fair, budget))
    while len(pieces) < rows:
        largest = max(pieces, key=lambda unit: (len(unit.numbers), unit.tokens))
        if len(largest.numbers) < 2:
            raise DataError(
                f"{sum(len(unit.numbers) for unit in units)} conversations cannot fill {rows} "
                "micro-batches; lower train.global_batch_size / train.micro_batch_size"
            )
        pieces.remove(largest)
        half = len(largest.numbers) // 2
        for members in (largest.numbers[:half], largest.numbers[half:]):
            pieces.append(_unit(members, lengths, largest.prefix))
    loads = [(0, row) for row in range(rows)]
    members_of: list[list[int]] = [[] for _ in range(rows)]
    for unit in sorted(pieces, key=lambda unit: -unit.tokens):
        load, row = heapq.heappop(loads)
        members_of[row] += unit.numbers
        heapq.heappush(loads, (load + unit.tokens, row))
    packed = [Unit(tuple(members_of[row]), load, 0) for load, row in loads]
    return sorted(packed, key=lambda row: -row.tokens)


def _unit(members: Sequence[int], lengths: Sequence[int], prefix: int) -> Unit:
    tokens = prefix + sum(lengths[number] - prefix for number in members)
    return Unit(tuple(members), tokens, prefix)


def _cut(unit: Unit, lengths: Sequence[int], limit: int) -> list[Unit]:
    """Cuts a unit into pieces of at most `limit` tokens, as far as single conversations allow."""
    if unit.tokens <= limit or len(unit.numbers) == 1:
        return [unit]
    pieces: list[Unit] = []
    members: list[int] = []
    for number in unit.numbers:
        if members and _unit([*members, number], lengths, unit.prefix).tokens > limit:
            pieces.append(_unit(members, lengths, unit.prefix))
            members = []
        members.append(number)
    return [*pieces, _unit(members, lengths, unit.prefix)]


__all__ = ["SharedImageCollator", "Unit", "balance", "make_units"]
