"""Which conversations make a micro-batch, for a whole run: the same on every process, resumable.

Passes over the data follow each other without a seam, so that every step holds exactly the global
batch (stock Trainer shortens the last step of each epoch). Each pass is shuffled by a generator of
its own, seeded by (seed, pass), so the order depends neither on the number of processes nor on
where a run was resumed. Within a step, conversations are dealt so that micro-batches cost about the
same: by length, or by picture where pictures are shared. A batch sampler yields the micro-batches
of a step in the order that accelerate deals them out: the first of each process, the second, ...
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler

from cogvlm_sft.data.mixture import ConversationDataset
from cogvlm_sft.data.packing import balance, make_units
from cogvlm_sft.errors import RecipeError
from cogvlm_sft.recipe import Recipe

_REPORTED_STEPS = 200
_PARTS = 8  # of a step at most, where steps are sorted by length together


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What the steps of a run hold, from its first ones; `str()` is what training prints.

    Attributes:
        conversations: of a step.
        pictures: computed in a step, on average.
        tokens: computed in a step, on average.
        largest: tokens of the largest micro-batch.
        padding: share of the places of a batch that carry nothing.
        idle: share of the time that processes wait for the one with the most tokens.
    """

    conversations: int
    pictures: float
    tokens: float
    largest: int
    padding: float
    idle: float

    def __str__(self) -> str:
        return (
            f"a step holds {self.conversations:,} conversations about {self.pictures:,.1f} "
            f"pictures, {self.tokens:,.0f} tokens; the largest micro-batch has {self.largest:,}; "
            f"padding {self.padding:.1%} (stored, not computed), processes idle {self.idle:.1%}"
        )


class GlobalBatchSampler(Sampler[list[int]]):
    """Micro-batches of a fixed number of conversations, alike in length."""

    def __init__(
        self,
        lengths: Sequence[int],
        pictures: Sequence[int],
        *,
        steps: int,
        global_batch: int,
        micro_batches: int,
        processes: int = 1,
        seed: int = 0,
        window: int = 1,
    ) -> None:
        """Set up the batches of a run.

        Args:
            lengths: tokens of each conversation.
            pictures: number of the picture that each begins with, -1 without.
            steps: of the run.
            global_batch: conversations of a step.
            micro_batches: of a step, over all processes.
            processes: that train together.
            seed: of the order.
            window: so many steps are sorted by length together and dealt out again; 1: none.
        """
        self.lengths, self.pictures = np.asarray(lengths), np.asarray(pictures)
        self.steps, self.global_batch, self.micro_batches = steps, global_batch, micro_batches
        self.processes, self.seed, self.window = processes, seed, window

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for first, numbers in self._windows(self.window):
            yield from self._deal(numbers, first)

    def report(self) -> BatchReport:
        """Counts over the first steps of the run."""
        pictures, tokens, places = [], [], []
        for number, batch in enumerate(self):
            if number >= _REPORTED_STEPS * self.micro_batches:
                break
            cost, seen = self._cost(batch)
            pictures.append(seen)
            tokens.append(cost)
            places.append(self._places(batch, cost))
        steps = len(tokens) / self.micro_batches
        together = np.asarray(tokens).reshape(-1, self.processes)
        return BatchReport(
            conversations=self.global_batch,
            pictures=sum(pictures) / steps,
            tokens=sum(tokens) / steps,
            largest=max(tokens),
            padding=1 - sum(tokens) / sum(places),
            idle=float(1 - together.mean(1).sum() / together.max(1).sum()),
        )

    def _cost(self, batch: list[int]) -> tuple[int, int]:
        """Tokens and pictures that a micro-batch computes."""
        return int(self.lengths[batch].sum()), int((self.pictures[batch] >= 0).sum())

    def _places(self, batch: list[int], tokens: int) -> int:
        return int(self.lengths[batch].max()) * len(batch)

    def _windows(self, steps: int) -> Iterator[tuple[int, np.ndarray]]:
        """Numbers of the conversations of so many steps, and the first of the steps."""
        waiting = np.empty(0, dtype=np.int64)
        passes = 0
        for first in range(0, self.steps, steps):
            wanted = min(steps, self.steps - first) * self.global_batch
            pieces = [waiting]
            while sum(map(len, pieces)) < wanted:
                pieces.append(self._pass(passes))
                passes += 1
            joined = np.concatenate(pieces)
            waiting = joined[wanted:]
            yield first, joined[:wanted]

    def _pass(self, number: int) -> np.ndarray:
        """The order of one pass over the data."""
        return self._permutation(len(self.lengths), number)

    def _permutation(self, size: int, number: int) -> np.ndarray:
        generator = torch.Generator()
        # Distinct for each (seed, number); both stay far below 2**31.
        generator.manual_seed(self.seed * 1_000_003 + number)
        return torch.randperm(size, generator=generator).numpy()

    def _deal(self, numbers: np.ndarray, first: int) -> Iterator[list[int]]:
        together = self.global_batch // self.micro_batches * self.processes
        steps = numbers.reshape(-1, self.global_batch)
        if len(steps) > 1:
            # Sorted, a step would hold one length: it gets parts from all over the window. Their
            # size knows nothing of micro-batches, so neither does what a step holds.
            parts = next(n for n in range(_PARTS, 0, -1) if self.global_batch % n == 0)
            cut = self._by_length(numbers).reshape(parts * len(steps), -1)
            steps = cut[self._permutation(len(cut), first)].reshape(steps.shape)
        for step in steps:
            for chunk in self._by_length(step).reshape(-1, together):
                for process in range(self.processes):
                    yield chunk[process :: self.processes].tolist()

    def _by_length(self, numbers: np.ndarray) -> np.ndarray:
        return numbers[np.argsort(-self.lengths[numbers], kind="stable")]


class SharedImageSampler(GlobalBatchSampler):
    """Micro-batches in which conversations about one picture stand together.

    A pass is an order of pictures; the conversations about one follow each other. A step is split
    into micro-batches of about as many tokens, whose number of conversations varies.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        pictures: Sequence[int],
        *,
        steps: int,
        global_batch: int,
        micro_batches: int,
        image_tokens: int,
        budget: int,
        processes: int = 1,
        seed: int = 0,
    ) -> None:
        """Set up the batches of a run; see `GlobalBatchSampler` for what is not named here.

        Args:
            lengths: tokens of each conversation.
            pictures: number of the picture that each begins with, -1 without.
            steps: of the run.
            global_batch: conversations of a step.
            micro_batches: of a step, over all processes.
            image_tokens: that conversations about one picture share.
            budget: most tokens of a micro-batch.
            processes: that train together.
            seed: of the order.

        Raises:
            RecipeError: a step of the run does not fit the budget.
        """
        super().__init__(
            lengths,
            pictures,
            steps=steps,
            global_batch=global_batch,
            micro_batches=micro_batches,
            processes=processes,
            seed=seed,
        )
        self.image_tokens, self.budget = image_tokens, budget
        # Conversations without a picture are groups of their own.
        alone = np.arange(len(self.pictures)) + self.pictures.max(initial=0) + 1
        self.group = np.unique(
            np.where(self.pictures >= 0, self.pictures, alone), return_inverse=True
        )[1]
        self._length_list, self._picture_list = self.lengths.tolist(), self.pictures.tolist()
        self._check()

    def _check(self) -> None:
        """Goes through the whole run: a step that does not fit is better known now."""
        needed, at = max((row[1], -step) for step, rows in enumerate(self._steps()) for row in rows)
        if needed > self.budget:
            raise RecipeError(
                f"data.token_budget is {self.budget:,}, but step {-at + 1} needs micro-batches of "
                f"{needed:,} tokens ({self.global_batch} conversations in {self.micro_batches} "
                f"micro-batches); set data.token_budget to {needed:,} or more, or lower "
                "train.micro_batch_size for more and smaller ones"
            )

    def _steps(self) -> Iterator[list[tuple[tuple[int, ...], int]]]:
        """The micro-batches of each step with their tokens, most tokens first."""
        for _, numbers in self._windows(1):
            units = make_units(
                numbers.tolist(), self._length_list, self._picture_list, self.image_tokens
            )
            rows = balance(units, self._length_list, self.micro_batches, self.budget)
            yield [(row.numbers, row.tokens) for row in rows]

    def __iter__(self) -> Iterator[list[int]]:
        for rows in self._steps():
            for at in range(0, self.micro_batches, self.processes):
                together = rows[at : at + self.processes]
                # The first process would have the largest of each round.
                if at // self.processes % 2:
                    together = together[::-1]
                for numbers, _ in together:
                    yield list(numbers)

    def _pass(self, number: int) -> np.ndarray:
        order = super()._pass(number)
        place = self._permutation(int(self.group.max()) + 1, number)
        return order[np.argsort(place[self.group[order]], kind="stable")]

    def _cost(self, batch: list[int]) -> tuple[int, int]:
        units = make_units(batch, self._length_list, self._picture_list, self.image_tokens)
        return sum(unit.tokens for unit in units), sum(unit.prefix > 0 for unit in units)

    def _places(self, batch: list[int], tokens: int) -> int:
        return tokens


def batches_of(
    recipe: Recipe, dataset: ConversationDataset, image_tokens: int, processes: int
) -> GlobalBatchSampler:
    """The micro-batches of a recipe's run.

    Args:
        recipe: its data and train sections.
        dataset: what it trains on.
        image_tokens: that a picture takes.
        processes: that train together.

    Raises:
        RecipeError: with shared pictures, a step that does not fit `data.token_budget`.
    """
    data, train = recipe.data, recipe.train
    lengths, pictures = dataset.lengths, dataset.leading_pictures
    common: dict[str, int] = {
        "steps": train.iterations,
        "global_batch": train.global_batch_size,
        "micro_batches": recipe.accumulation_steps(processes) * processes,
        "processes": processes,
        "seed": train.seed,
    }
    if not data.share_images:
        return GlobalBatchSampler(lengths, pictures, **common, window=data.length_window)
    assert data.token_budget is not None
    return SharedImageSampler(
        lengths,
        pictures,
        **common,
        image_tokens=image_tokens,
        budget=data.token_budget,
    )


__all__ = ["BatchReport", "GlobalBatchSampler", "SharedImageSampler", "batches_of"]
