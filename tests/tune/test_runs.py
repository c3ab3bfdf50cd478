"""Whole runs with factors and 4-bit weights: resumed = unbroken, and their results answer."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from bitsandbytes.optim import AdamW8bit
from safetensors.torch import load_file

from cogvlm_sft import Recipe, RecipeError, train
from cogvlm_sft.chat.session import Chat, Decoding
from cogvlm_sft.checkpoint.load import load_model, load_processor
from cogvlm_sft.cli import main
from cogvlm_sft.evaluation.loading import open_model
from cogvlm_sft.training import trainer as training
from cogvlm_sft.training.stopping import StopOnSignal, TrainingStopped

MakeRecipe = Callable[..., Recipe]
QLORA = {
    "model__quantize": "nf4",
    "tune__language": {"mode": "lora", "rank": 4, "dropout": 0.1},
    "tune__visual_expert": {"mode": "lora", "rank": 16, "variant": "dora", "dropout": 0.2},
    "tune__adapter": {"mode": "full", "rate": 0.5},
    "train__optimizer": "paged_adamw_8bit",
    "train__iterations": 5,
    "train__warmup_iterations": 2,
}
QLORA["tune__language"] = {**QLORA["tune__language"], "variant": "dora"}


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Sends this process SIGTERM while it trains the given step."""
    original = StopOnSignal.on_step_end

    def send(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", send)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        QLORA,
        {
            "tune__visual_expert": {"mode": "lora", "rank": 4, "variant": "pissa"},
            "tune__language": {"mode": "lora", "rank": 2, "dropout": 0.1},
            "train__iterations": 5,
        },
    ],
    ids=["4-bit, DoRA, 8-bit Adam", "PiSSA"],
)
def test_an_interrupted_run_ends_as_an_unbroken_one(
    make_recipe: MakeRecipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, object],
) -> None:
    """Bit for bit, dropout included; the second pass over the pictures begins in the 5th step."""
    unbroken = train(make_recipe(**changes, train__output=tmp_path / "unbroken")).output
    recipe = make_recipe(**changes)
    with monkeypatch.context() as patch, pytest.raises(TrainingStopped):
        stop_after(patch, 3)
        train(recipe)
    assert not (recipe.train.output / "adapter_config.json").exists()
    snapshot = recipe.train.output / "snapshots" / "step-00000003"
    assert not list(snapshot.glob("model*.safetensors")), "snapshots hold what learns only"
    resumed = train(recipe).output
    one, other = (load_file(run / "adapter_model.safetensors") for run in (unbroken, resumed))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    with pytest.raises(RecipeError, match="holds a finished run"):
        train(recipe)


@pytest.mark.slow
def test_what_learns_beside_4_bit_weights_is_fp32_and_unrounded(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard: TRL casts it to bf16, where most updates of a small rate round to nothing."""
    seen = {}
    original = training.CogVLMTrainer.create_optimizer

    def watch(self, model=None):  # type: ignore[no-untyped-def]
        optimizer = original(self, model)
        base = load_file(Path(self.adapter.base) / "model.safetensors")
        named = dict(self.model.named_parameters())
        seen["glu"] = torch.equal(
            named["model.vision.linear_proj.gate_proj.weight"],
            base["model.vision.linear_proj.gate_proj.weight"],
        )
        seen["dtypes"] = {p.dtype for p in named.values() if p.requires_grad}
        seen["optimizer"] = type(getattr(optimizer, "optimizer", optimizer))
        seen["4-bit"] = sum(type(m) is Linear4bit for m in self.model.modules())
        return optimizer

    monkeypatch.setattr(training.CogVLMTrainer, "create_optimizer", watch)
    train(make_recipe(**{**QLORA, "train__iterations": 2}))
    assert seen == {
        "glu": True,
        "dtypes": {torch.float32},
        "optimizer": AdamW8bit,
        "4-bit": 2 * 10,  # five linears of each expert in each of two layers
    }


@pytest.mark.slow
def test_small_rates_move_the_weights(make_recipe: MakeRecipe) -> None:
    """lr 1e-5 for 20 steps beside 4-bit weights: over 95 % of the entries move."""
    recipe = make_recipe(
        **{**QLORA, "train__iterations": 20, "train__optimizer": "adamw"},
        train__learning_rate=1e-5,
        train__save_every=1,
        train__keep_snapshots=30,
    )
    run = train(recipe).output
    before = load_file(run / "snapshots" / "step-00000001" / "adapter_model.safetensors")
    after = load_file(run / "adapter_model.safetensors")
    moved = sum((after[name] != value).sum().item() for name, value in before.items())
    # What the last layer makes of picture positions behind its keys is read by nobody.
    asleep = [
        n for n in before if ".layers.1." in n and ("vision_mlp" in n or "vision_expert_dense" in n)
    ]
    total = sum(value.numel() for name, value in before.items() if name not in asleep)
    assert moved / total > 0.95


@pytest.mark.slow
def test_the_result_of_a_run_answers(
    make_recipe: MakeRecipe, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(make_recipe(**{**QLORA, "train__iterations": 2})).output
    picture = str(world / "images" / "00.png")
    question = ["--question", "What colour is it?"]
    assert main(["chat", str(run), "--image", picture, *question]) == 0
    assert capsys.readouterr().out.strip()
    plain = load_model(run)
    assert not [name for name, _ in plain.named_parameters() if "lora" in name]
    beside = load_model(run, quantize=["language", "visual_expert"])
    assert sum(type(module) is Linear4bit for module in beside.modules()) == 20
    # In 4 bits it answers as the model that was trained, whose own groups are taken.
    question += ["--json", "--quantize", "nf4", "--max-new-tokens", "16"]
    assert main(["chat", str(run), "--image", picture, *question]) == 0
    chat = Chat(beside, load_processor(run), decoding=Decoding(max_new_tokens=16))
    chat.show(picture)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["answer"] == chat.say("What colour is it?")


def test_an_adapter_is_asked_beside_the_groups_it_was_trained_beside(
    make_recipe: MakeRecipe,
) -> None:
    groups = ["language", "visual_expert", "vision_tower"]
    changes = {"train__iterations": 2, "model__quantize": {"groups": groups}}
    run = train(make_recipe(**{**QLORA, **changes})).output
    model = open_model(run, quantize="nf4")
    held = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert any(name.startswith("model.vision.transformer") for name in held)
