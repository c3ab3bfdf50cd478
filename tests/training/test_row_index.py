"""Records are read and encoded by one process, once; others and resumed runs take its index."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogvlm_sft import DataError, Recipe, train
from cogvlm_sft.data.collator import CogVLMCollator
from cogvlm_sft.data.mixture import ConversationDataset
from cogvlm_sft.errors import TrainingError
from cogvlm_sft.training import row_index
from cogvlm_sft.training.preflight import processor_for
from cogvlm_sft.training.row_index import dataset_of

MakeRecipe = Callable[..., Recipe]


def make(recipe: Recipe) -> ConversationDataset:
    sources = [(source.path, source.weight) for source in recipe.data.train]
    return dataset_of(recipe, processor_for(recipe), "train", sources)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on nobody reads the records."""

    def refuse(*_: object) -> None:
        raise AssertionError("the records are read again")

    monkeypatch.setattr(ConversationDataset, "_scan", refuse)


@pytest.fixture
def recipe(make_recipe: MakeRecipe, world: Path) -> Recipe:
    return make_recipe(data__train=[{"path": str(world / "train.jsonl"), "weight": 1.5}])


@pytest.fixture
def first(recipe: Recipe) -> ConversationDataset:
    return make(recipe)


def test_the_index_gives_the_same_data_set(
    recipe: Recipe, first: ConversationDataset, unread: None
) -> None:
    again = make(recipe)
    assert len(again) == len(first) == 33
    assert again.lengths == first.lengths and again.leading_pictures == first.leading_pictures
    assert str(again.report) == str(first.report)
    for one, other in zip((first[5], first[30]), (again[5], again[30]), strict=True):
        assert one["input_ids"] == other["input_ids"] and one["pictures"] == other["pictures"]


def waiting(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process, for which the index comes after it has looked for it in vain."""
    (file,) = recipe.train.output.glob("rows-*")
    away = file.rename(file.with_name("elsewhere"))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(row_index.time, "sleep", lambda _: away.rename(file))


def test_other_processes_wait_for_it(
    recipe: Recipe, first: ConversationDataset, monkeypatch: pytest.MonkeyPatch, unread: None
) -> None:
    waiting(recipe, monkeypatch)
    assert make(recipe).lengths == first.lengths


def test_other_processes_do_not_wait_for_a_dead_one(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine no launcher ends them."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(row_index, "_PATIENCE_SECONDS", 0.3)
    with pytest.raises(TrainingError, match="process 0, which reads the records"):
        make(recipe)


def test_the_process_that_reads_gives_signs_of_life(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As long as they come, others wait beyond their patience."""
    seen: set[int] = set()
    scan = ConversationDataset._scan

    def slowly(self: ConversationDataset, *rest: Any) -> None:
        (sign,) = recipe.train.output.glob("rows-*.alive")
        while len(seen) < 4:
            seen.add(sign.stat().st_mtime_ns)
            time.sleep(0.01)
        scan(self, *rest)

    monkeypatch.setattr(ConversationDataset, "_scan", slowly)
    monkeypatch.setattr(row_index, "_SECONDS_BETWEEN_SIGNS", 0.05)
    monkeypatch.setenv("WORLD_SIZE", "16")
    assert len(make(recipe)) == 33
    assert not list(recipe.train.output.glob("*.alive"))


def test_a_process_that_sees_other_data_says_so(
    make_recipe: MakeRecipe, first: ConversationDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_recipe()  # as `recipe`, but for the weight
    waiting(other, monkeypatch)
    with pytest.raises(DataError, match="process 1 finds other conversations"):
        make(other)


def test_other_settings_or_a_damaged_index_read_again(
    make_recipe: MakeRecipe, recipe: Recipe, first: ConversationDataset
) -> None:
    assert len(make(make_recipe())) == 22
    (file,) = recipe.train.output.glob("rows-*")
    file.write_bytes(file.read_bytes()[:-200])
    assert len(make(recipe)) == 33


def test_a_run_that_goes_on_reads_no_records(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(train__save_every=2)
    collate, calls = CogVLMCollator.__call__, []

    def fail(self: CogVLMCollator, items: list[object]) -> object:
        calls.append(items)
        if len(calls) == 8:
            raise DataError("broken later")
        return collate(self, items)

    with monkeypatch.context() as patch:
        patch.setattr(CogVLMCollator, "__call__", fail)
        with pytest.raises(DataError, match="broken later"):
            train(recipe)
    monkeypatch.setattr(ConversationDataset, "_scan", lambda *_: pytest.fail("read again"))
    output = train(recipe).output
    assert not list(output.glob("rows-*")), "a finished run keeps no index"
