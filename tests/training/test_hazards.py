"""Hazards of the stack that no other test stands for, and the table of all of them."""

import dataclasses
import re
import sys
import tomllib
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import pytest
import torch

from cogvlm_sft import Recipe, train
from cogvlm_sft.checkpoint.load import load_model
from cogvlm_sft.training import arguments
from cogvlm_sft.training.arguments import training_arguments

ROOT = Path(__file__).parents[2]
MakeRecipe = Callable[..., Recipe]


def test_trl_never_truncates(make_recipe: MakeRecipe) -> None:
    """TRL's 1,024 tokens are fewer than one picture of 490 px takes; it cuts without an error."""
    assert training_arguments(make_recipe(), 1).max_length is None


def test_checkpointing_by_the_older_name(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 5.23 transformers has no `activation_checkpointing`; TRL's default is on."""
    names = {field.name for field in dataclasses.fields(arguments.SFTConfig)}
    older = dataclasses.make_dataclass(
        "SFTConfig", sorted(names - {"activation_checkpointing"}), kw_only=True
    )
    for name in names:
        setattr(older, name, None)
    older.__init__ = lambda self, **given: self.__dict__.update(given)  # type: ignore[misc]
    monkeypatch.setattr(arguments, "SFTConfig", older)
    for wanted in (True, False):
        made = training_arguments(make_recipe(train__gradient_checkpointing=wanted), 1)
        assert made.gradient_checkpointing is wanted
        assert "activation_checkpointing" not in vars(made)


def test_ddp_does_not_search_for_unused_parameters(make_recipe: MakeRecipe) -> None:
    """TRL lets it search at every step; here every part runs for every batch."""
    assert training_arguments(make_recipe(), 1).ddp_find_unused_parameters is False


def test_the_dtype_of_a_folder_is_not_the_dtype_of_the_weights(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    """transformers 5 loads in the dtype of config.json; masters would be rounded."""
    folder = train(make_recipe(model__dtype="bfloat16", train__iterations=2)).output
    assert load_model(folder).dtype == torch.float32
    assert load_model(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_torchvision_is_not_needed(make_recipe: MakeRecipe) -> None:
    """Its PyPI builds do not import beside a CPU torch, and pull another torch in."""
    train(make_recipe(train__iterations=2))
    assert "torchvision" not in sys.modules
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = chain(project["dependencies"], *project["optional-dependencies"].values())
    assert not [name for name in wanted if name.startswith("torchvision")]


def test_gradients_of_frozen_parts_are_never_made(make_recipe: MakeRecipe) -> None:
    """A rate of zero would still decay weights and cost their gradients; frozen is frozen."""
    from cogvlm_sft.training.trainer import CogVLMTrainer

    seen: list[bool] = []
    original = CogVLMTrainer.create_optimizer

    def watch(self: CogVLMTrainer, model: object = None) -> object:
        tower = self.model.model.vision.transformer.parameters()
        seen.append(any(parameter.requires_grad for parameter in tower))
        return original(self, model)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CogVLMTrainer, "create_optimizer", watch)
        train(make_recipe(tune__vision_tower={"mode": "frozen"}, train__iterations=2))
    assert seen and not any(seen)


def test_every_hazard_of_the_table_has_its_test() -> None:
    """docs/training.md: hazard, cure, and the one test that fails without it."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = text.partition("## Hazards")[2].partition("\n## ")[0]
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)", table)
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(named) == len(rows) - 1 > 30  # less the head
    for path, name in named:
        source = (ROOT / path).read_text(encoding="utf-8")
        assert re.search(rf"^def {name}\(", source, re.MULTILINE), f"{path}::{name}"
