"""What a run says about itself: `run.json`, and the card of its checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from cogvlm_sft import Recipe, RecipeError, train
from cogvlm_sft.recipe import recipe_from_dict
from cogvlm_sft.training.provenance import data_digests

MakeRecipe = Callable[..., Recipe]


def test_the_card_is_ready_for_the_hub(make_recipe: MakeRecipe, world: Path) -> None:
    prompts = [{"question": "What colour | is it?", "image": "00.png"}]
    tree = make_recipe(data__validation=world / "train.jsonl").model_dump(mode="json")
    tree["evaluate"] = {"every": 3, "prompts": prompts, "max_new_tokens": 3}
    recipe = recipe_from_dict(tree, source="recipes/tiny.yaml")
    output = train(recipe).output
    card = (output / "README.md").read_text(encoding="utf-8")
    head, text = card.split("---\n", 2)[1:]
    assert yaml.safe_load(head)["library_name"] == "transformers"
    digest = data_digests(recipe)[str(world / "train.jsonl")]
    run = json.loads((output / "run.json").read_text())
    for part in (
        "![training loss](loss.png)",
        digest,
        f"torch {run['versions']['torch']}",
        "visual_expert",
        "69,632",
        "held-out accuracy",
        "Answers after step 6",
        r"What colour \| is it?",
        "learning_rate: 0.001",
        "6 steps of 4 conversations, from fresh weights",
    ):
        assert part in text, part
    assert (output / "loss.png").is_file()
    assert text.count("```") % 2 == 0


def test_a_manifest_stands_for_its_build(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    build = tmp_path / "build"
    build.mkdir()
    (build / "manifest.json").write_text("{}")
    recipe = make_recipe(data__train=[{"path": str(build)}])
    before = data_digests(recipe)
    (build / "manifest.json").write_text('{"seed": 1}')
    assert data_digests(recipe) != before


def test_other_data_does_not_resume(
    make_recipe: MakeRecipe, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "mine.jsonl"
    shutil.copy(world / "train.jsonl", data)
    recipe = make_recipe(data__train=[{"path": str(data)}], train__save_every=3)
    output = train(recipe).output
    (output / "config.json").unlink()  # as if it had not been finished
    lines = data.read_text().splitlines()
    data.write_text("\n".join(reversed(lines)))
    with pytest.raises(RecipeError, match=r"mine\.jsonl has changed since the run"):
        train(recipe)
