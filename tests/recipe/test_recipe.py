"""Recipes: closed keys, strict types, overrides, and checks across keys."""

from pathlib import Path

import pytest
import yaml

from cogvlm_sft.errors import RecipeError
from cogvlm_sft.recipe import load_recipe, recipe_from_dict
from cogvlm_sft.recipe.files import copy_recipe, list_recipes, training_recipes

SMALL = """
model: {checkpoint: here}
data: {train: [{path: a}], image_root: images}
train:
  output: out
  iterations: 10
  global_batch_size: 8
  micro_batch_size: 2
  learning_rate: 1e-5
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def test_numbers_are_read_by_yaml_1_2(recipe_file: Path) -> None:
    assert load_recipe(recipe_file).train.learning_rate == 1e-5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.learning_rat=1", ["train.learning_rat", "train.learning_rate"]),
        ("learning_rate=1.0", ["'learning_rate'", "train.learning_rate"]),
        ("tune.visual_experts.mode=full", ["tune.visual_experts", "tune.visual_expert"]),
        ("data.train.0.wieght=2", ["wieght", "weight"]),
        ("train.iterations='8'", ["train.iterations", "'8' (a string)", "integer"]),
        ("train.iterations=1.5", ["1.5 (a number)", "integer"]),
        ("train.gradient_checkpointing=no", ["'no' (a string)", "boolean"]),
        ("train.micro_batch_size=0", ["0 (an integer)", "greater than 0"]),
        ("tune.language.mode=half", ["'frozen', 'full' or 'lora'", "half"]),
        ("train=3", ["3 (an integer)", "mapping"]),
        ("train.micro_batch_size=3", ["global_batch_size 8", "multiple", "3"]),
        ("train.warmup_iterations=11", ["warmup_iterations 11", "iterations 10"]),
        ("model.config={}", ["exactly one", "both"]),
        ("model.checkpoint=null", ["exactly one", "neither"]),
        ("evaluate.every=5", ["data.validation"]),
        ("train.iterations", ["key.sub=value"]),
        ("data.train.1.weight=2", ["'1'", "0 to 0"]),
        ("data.train.0.weight=1e999", ["data.train.0.weight is inf", "finite"]),
        ("train.learning_rate=1e999", ["train.learning_rate is inf", "finite"]),
        ("data.train=[]", ["expected at least 1 item(s), found 0"]),
        (
            "tune.vision_tower={mode: frozen, rate: 3}",
            ["rate is 3", "'tune.vision_tower={mode: frozen}'"],
        ),
    ],
)
def test_mistakes_name_the_key_and_the_fix(
    recipe_file: Path, override: str, words: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe_file, [override])
    for word in words:
        assert word in str(caught.value)


def test_a_mistake_in_the_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "typo.yaml"
    path.write_text(SMALL.replace("iterations", "iteration"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"typo\.yaml: unknown key 'train\.iteration'"):
        load_recipe(path)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(SMALL + "  iterations: 20\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="stands twice"):
        load_recipe(path)


def test_all_groups_frozen_is_refused(recipe_file: Path) -> None:
    frozen = [
        f"tune.{group}.mode=frozen"
        for group in ("language", "visual_expert", "adapter", "vision_tower", "embeddings")
    ]
    with pytest.raises(RecipeError, match="nothing would be trained"):
        load_recipe(recipe_file, frozen)


def test_overrides_reach_lists_and_absent_sections(recipe_file: Path) -> None:
    recipe = load_recipe(
        recipe_file,
        [
            "data.train.0.weight=2",
            "data.validation=held",
            "evaluate.every=5",
            "tune.adapter.rate=2",
        ],
    )
    assert recipe.data.train[0].weight == 2.0
    assert recipe.evaluate is not None
    assert recipe.tune.adapter.rate == 2.0


def test_of_two_settings_for_a_key_the_wrong_one_is_named(recipe_file: Path) -> None:
    with pytest.raises(RecipeError, match=r"override 'train\.iterations=many'"):
        load_recipe(recipe_file, ["train.iterations=5", "train.iterations=many"])


def test_a_rate_is_left_out_where_nothing_learns(recipe_file: Path) -> None:
    """Also where a setting freezes what the file gives a rate; and a frozen group has none."""
    frozen = ["tune.language.rate=0.1", "tune.language.mode=frozen", "tune.language.rate=null"]
    tune = load_recipe(recipe_file, frozen).tune
    assert tune.language.rate is None and "language" not in tune.trainable()
    assert tune.adapter.rate == 1.0


def test_resolved_recipe_loads_back_equal(recipe_file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(resolved).model_dump() == recipe.model_dump()


@pytest.mark.parametrize(("world", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_fills_the_global_batch(
    recipe_file: Path, world: int, accumulation: int
) -> None:
    assert load_recipe(recipe_file).accumulation_steps(world) == accumulation


def test_processes_that_do_not_divide_are_refused(
    recipe_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(RecipeError, match=r"2 x 3 process\(es\) = 6"):
        load_recipe(recipe_file)


def test_missing_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"no recipe 'chatt'.*did you mean 'chat'"):
        load_recipe("chatt")


def test_copy_never_replaces(tmp_path: Path) -> None:
    target = copy_recipe("chat", tmp_path / "mine.yaml")
    assert load_recipe(target).train.iterations == 8000
    with pytest.raises(RecipeError, match="exists"):
        copy_recipe("chat", target)


def test_every_packaged_recipe_is_valid_and_titled() -> None:
    assert "chat" in training_recipes()
    for path in training_recipes().values():
        load_recipe(path)
    for name, title in list_recipes():
        assert title, name


def test_chat_is_the_published_recipe() -> None:
    recipe = load_recipe("chat")
    train, tune = recipe.train, recipe.tune
    assert (train.iterations, train.global_batch_size) == (8000, 640)
    assert (train.learning_rate, train.warmup_iterations) == (1e-5, 50)
    assert tune.trainable() == {
        "language": 0.1,
        "visual_expert": 1.0,
        "adapter": 1.0,
        "embeddings": 0.1,
    }
    assert (train.betas, train.epsilon) == ([0.9, 0.95], 1e-8)
    assert (train.weight_decay, train.max_grad_norm, train.schedule) == (0.05, 1.0, "cosine")
    for world in (1, 8, 16, 32, 64):
        recipe.accumulation_steps(world)


def test_recipe_from_dict_is_the_same_check() -> None:
    tree = yaml.safe_load(SMALL.replace("1e-5", "0.1"))
    tree["train"]["lr"] = 1
    with pytest.raises(RecipeError, match=r"train\.lr"):
        recipe_from_dict(tree, source="code")
