"""Every packaged recipe: found by itself, documented, and what its source says."""

import re
from collections.abc import Iterator

import pytest
from pydantic import BaseModel

from cogvlm_sft.cli import main
from cogvlm_sft.recipe import Recipe, TrainSection, TuneSection, load_recipe
from cogvlm_sft.recipe.files import training_recipes
from cogvlm_sft.recipe.mistakes import sections_in

RECIPES = training_recipes()
FULL_SCALE = [name for name in RECIPES if "/" not in name]
PUBLISHED = {
    # iterations, global batch, rate, warm-up
    "chat": (8000, 640, 1e-5, 50),
    "chat_v1_1": (6000, 1024, 1e-5, 50),
    "captcha": (800, 32, 1e-5, 16),
    "pretrain_caption": (120_000, 8192, 1e-4, 12_000),
    "pretrain_grounding_224": (30_000, 1024, 1e-5, 1200),
    "pretrain_grounding_490": (30_000, 1024, 1e-5, 1200),
}


def test_they_are_found() -> None:
    assert set(PUBLISHED) | {"vqa", "grounding"} <= set(FULL_SCALE)


@pytest.mark.parametrize("name", RECIPES)
def test_each_loads_and_says_how_to_run_it(name: str) -> None:
    text = RECIPES[name].read_text(encoding="utf-8")
    recipe = load_recipe(name)
    head = text[: re.search(r"^[a-z]", text, re.MULTILINE).start()]  # type: ignore[union-attr]
    for line in head.splitlines():
        assert not line or line.startswith("#"), line
    assert re.search(rf"\btrain (recipes/)?{re.escape(name)}\b", head), "no command in its head"
    assert "Memory" in head
    assert str(recipe.train.output) in head or recipe.train.output.name in head
    for world in (1, 8, 64) if "/" not in name and recipe.train.global_batch_size >= 640 else (1,):
        recipe.accumulation_steps(world)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name: str) -> None:
    train = load_recipe(name).train
    found = (
        train.iterations,
        train.global_batch_size,
        train.learning_rate,
        train.warmup_iterations,
    )
    assert found == PUBLISHED[name]
    assert (train.betas, train.epsilon, train.weight_decay) == ([0.9, 0.95], 1e-8, 0.05)
    assert train.schedule == "cosine"


def test_what_learns() -> None:
    def rates(name: str) -> dict[str, float]:
        return load_recipe(name).tune.trainable()

    for name in ("pretrain_caption", "pretrain_grounding_224", "pretrain_grounding_490"):
        assert rates(name) == {"visual_expert": 1.0, "adapter": 1.0}
    assert rates("chat_v1_1")["vision_tower"] == 0.1
    assert "vision_tower" not in rates("chat")


@pytest.mark.parametrize("name", [name for name in FULL_SCALE if f"demo/{name}" in RECIPES])
def test_demo_scale_has_the_same_structure(name: str) -> None:
    full, small = load_recipe(name), load_recipe(f"demo/{name}")
    for group, tuning in full.tune:
        assert getattr(small.tune, group) == tuning, group
    assert small.train.schedule == full.train.schedule


def sections(model: type[BaseModel] = Recipe) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        for inner in sections_in(field.annotation):
            yield from sections(inner)


@pytest.mark.parametrize(
    "section", sorted(set(sections()) - {Recipe, TuneSection}, key=lambda s: s.__name__)
)
def test_every_key_is_documented(section: type[BaseModel]) -> None:
    documented = set(re.findall(r"^\s+(\w+): ", section.__doc__ or "", re.MULTILINE))
    assert set(section.model_fields) <= documented


def test_keys_are_explained_at_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipe", "keys"]) == 0
    printed = capsys.readouterr().out
    names = set(re.findall(r"^([\w.]+): ", printed, re.MULTILINE))
    for expected in ("model.quantize.groups", "data.train.N.weight", "tune.adapter.rate"):
        assert expected in names
    assert len(names) > 80
    assert 'train.schedule: cosine | constant, default "cosine"\n    after the warm-up' in printed
    assert main(["recipe", "keys", "train"]) == 0
    assert capsys.readouterr().out.count("\ntrain.") == len(TrainSection.model_fields) - 1
    assert main(["recipe", "keys", "trian"]) == 2
    assert "the sections are model, data, tune, train, evaluate" in capsys.readouterr().err
