"""Whose turn it is: exact global batches, one order everywhere, equal work, shared pictures."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvlm_sft.errors import RecipeError
from cogvlm_sft.training.samplers import GlobalBatchSampler, SharedImageSampler

PREFIX = 20


def by_length(lengths: list[int], **changes: Any) -> GlobalBatchSampler:
    options = {"steps": 3, "global_batch": 8, "micro_batches": 4, "seed": 3, **changes}
    return GlobalBatchSampler(lengths, [-1] * len(lengths), **options)


def shared(lengths: list[int], pictures: list[int], **changes: Any) -> SharedImageSampler:
    options = {"steps": 3, "global_batch": 8, "micro_batches": 4, "budget": 10**6, "seed": 3}
    return SharedImageSampler(lengths, pictures, image_tokens=PREFIX, **{**options, **changes})


def steps_of(sampler: GlobalBatchSampler) -> list[list[list[int]]]:
    batches = list(sampler)
    assert len(batches) == len(sampler)
    count = sampler.micro_batches
    return [batches[at : at + count] for at in range(0, len(batches), count)]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def test_passes_follow_each_other_without_a_seam() -> None:
    sampler = by_length(list(range(1, 11)), steps=5, global_batch=4, micro_batches=2)
    order = [flat(step) for step in steps_of(sampler)]
    seen = [number for step in order for number in step]
    assert len(seen) == 20
    # The third step holds the end of the first pass and the beginning of the second.
    assert set(range(10)) - set(flat(order[:2])) <= set(order[2])
    assert Counter(seen) == {number: 2 for number in range(10)}
    assert list(sampler) == list(sampler)
    other = by_length(list(range(1, 11)), steps=5, global_batch=4, micro_batches=2, seed=4)
    assert list(sampler) != list(other)


@given(
    pictures=st.lists(st.integers(-1, 6), min_size=5, max_size=60),
    micro_batches=st.sampled_from([1, 2, 4, 8]),
    processes=st.sampled_from([1, 2]),
    seed=st.integers(0, 5),
)
def test_every_step_holds_the_global_batch_once(
    pictures: list[int], micro_batches: int, processes: int, seed: int
) -> None:
    lengths = [PREFIX + 2 + number % 7 for number in range(len(pictures))]
    if micro_batches % processes:
        return
    common = {"steps": 7, "global_batch": 8, "micro_batches": micro_batches, "seed": seed}
    one = shared(lengths, pictures, **common)
    several = shared(lengths, pictures, processes=processes, **common)
    plain = by_length(lengths, **common)
    for sampler in (one, several, plain):
        for step in steps_of(sampler):
            assert sum(map(len, step)) == 8
            assert all(step)
        counts = Counter(number for batch in sampler for number in batch).values()
        assert max(counts) - min([*counts, 0 if len(counts) < len(pictures) else max(counts)]) <= 1
    # The same conversations in the same steps, however many processes there are.
    for left, right in zip(steps_of(one), steps_of(several), strict=True):
        assert sorted(flat(left)) == sorted(flat(right))


@given(
    steps=st.integers(1, 9),
    batch=st.sampled_from([4, 8, 12, 24]),
    window=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_a_step_holds_the_same_whatever_the_micro_batches(
    steps: int, batch: int, window: int, seed: int
) -> None:
    """So a run may go on with another micro-batch, and on other GPUs, in mid-window too."""
    lengths = np.random.default_rng(seed).integers(10, 99, 40).tolist()
    common = {"steps": steps, "global_batch": batch, "window": window, "seed": seed}
    found = [
        [sorted(flat(step)) for step in steps_of(by_length(lengths, **common, **split))]
        for split in (
            {"micro_batches": 1, "processes": 1},
            {"micro_batches": batch // 2, "processes": 1},
            {"micro_batches": batch // 2, "processes": 2},
            {"micro_batches": batch, "processes": 4},
        )
    ]
    assert found[0] == found[1] == found[2] == found[3]
    assert all(len(step) == batch for step in found[0])


def test_conversations_about_one_picture_stand_together() -> None:
    pictures = [number // 4 for number in range(64)]
    sampler = shared([PREFIX + 10] * 64, pictures, steps=8, global_batch=16, micro_batches=4)
    for step in steps_of(sampler):
        assert len({pictures[number] for number in flat(step)}) <= 5  # 4, or one cut by the step
        for batch in step:
            assert len({pictures[number] for number in batch}) <= 2
    report = sampler.report()
    assert 4 <= report.pictures <= 5
    assert f"16 conversations about {report.pictures:,.1f} pictures" in str(report)
    assert report.padding == 0


def test_conversations_without_a_picture_are_not_joined() -> None:
    sampler = shared([30] * 16, [-1] * 16, steps=2)
    assert sampler.report().tokens == 8 * 30
    assert sampler.report().pictures == 0


def test_rows_cost_about_the_same() -> None:
    generator = np.random.default_rng(0)
    pictures = generator.integers(0, 400, 2000).tolist()
    lengths = (PREFIX + generator.integers(5, 60, 2000)).tolist()
    sampler = shared(lengths, pictures, steps=20, global_batch=128, micro_batches=8, processes=4)
    report = sampler.report()
    assert report.idle < 0.03
    assert report.largest < 1.2 * report.tokens / 8
    plain = by_length(lengths, steps=20, global_batch=128, micro_batches=8, processes=4)
    assert plain.report().idle < 0.05
    # Of the lengths of 224 px pictures with text; padding is not computed, only stored.
    real = [length + 258 for length in lengths]
    bucketed = by_length(real, steps=20, global_batch=128, micro_batches=8, processes=4)
    assert bucketed.report().padding < 0.08
    # Sorted over several steps, micro-batches are more alike, and steps still mix lengths.
    wide = by_length(lengths, steps=20, global_batch=128, micro_batches=32, processes=4, window=10)
    narrow = by_length(lengths, steps=20, global_batch=128, micro_batches=32, processes=4)
    assert wide.report().padding < narrow.report().padding
    means = [np.mean([lengths[n] for n in flat(step)]) for step in steps_of(wide)]
    assert np.std(means) < 8


def test_a_picture_with_many_conversations_is_cut() -> None:
    step, *_ = steps_of(shared([PREFIX + 10] * 8, [0] * 8, steps=1))
    assert [len(batch) for batch in step] == [2, 2, 2, 2]


def test_a_step_over_the_budget_names_the_budget_it_needs() -> None:
    lengths = [PREFIX + 40] * 32
    pictures = list(range(32))
    with pytest.raises(RecipeError, match=r"is 100, but step 1 needs .* of 120 tokens .* to 120 "):
        shared(lengths, pictures, budget=100)
    shared(lengths, pictures, budget=120)
