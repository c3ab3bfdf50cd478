"""What the trainer adds to TRL's: rates, fp32 weights, the global batch, the order of the data."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

from cogvlm_sft import CogVLMForCausalLM, Recipe, RecipeError, train
from cogvlm_sft.model.layers_cogvlm import CogVLMDecoderLayer
from cogvlm_sft.recipe import recipe_from_dict
from cogvlm_sft.training import snapshots
from cogvlm_sft.training.optimization import hold_trainable_in_fp32, rate_schedule
from cogvlm_sft.training.telemetry import read_metrics
from cogvlm_sft.training.trainer import CogVLMTrainer
from cogvlm_sft.tune import group_of, set_trainable

MakeRecipe = Callable[..., Recipe]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def initial_weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    from cogvlm_sft.checkpoint.load import build_model

    torch.manual_seed(recipe.train.seed)
    return build_model(recipe.model.config or {}).state_dict()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_run_writes_checkpoint_logs_and_picture(make_recipe: MakeRecipe, world: Path) -> None:
    recipe = make_recipe(data__validation=world / "train.jsonl", train__learning_rate=3e-3)
    result = train(recipe)
    assert result.steps == 6
    rows = read_metrics(result.output / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 6
    assert losses[-1] == result.final_loss < losses[0]
    assert rows[-1]["eval_loss"] == result.held_out_loss
    assert (result.output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(result.output.rglob("*.bin"))
    model = CogVLMForCausalLM.from_pretrained(result.output)
    assert same(model.state_dict(), weights(result.output))
    for name in ("tokenizer.json", "processor_config.json", "recipe.yaml"):
        assert (result.output / name).is_file()
    assert not list(result.output.parent.glob(".*"))


def test_rates_per_group_keep_their_ratio(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(
        tune__language={"rate": 0.1},
        tune__embeddings={"rate": 0.1},
        tune__vision_tower={"mode": "frozen"},
    )
    before = initial_weights(recipe)
    result = train(recipe)
    for row in read_metrics(result.output / "metrics.jsonl"):
        assert row["lr/language"] == pytest.approx(0.1 * row["lr/visual_expert"])
        assert row["lr/embeddings"] == pytest.approx(0.1 * row["lr/adapter"])
        assert row["learning_rate"] == row["lr/visual_expert"]
        assert "lr/vision_tower" not in row
    after = weights(result.output)
    moved: dict[str, float] = {}
    for name, value in before.items():
        if name.endswith("inv_freq"):
            continue
        change = (after[name] - value).abs().max().item()
        group = group_of(name)
        moved[group] = max(moved.get(group, 0.0), change)
    assert moved["vision_tower"] == 0.0
    # An AdamW entry moves by about the rate at each step, so the ratio shows in the weights.
    assert 0.05 < moved["language"] / moved["visual_expert"] < 0.2
    assert 0.05 < moved["embeddings"] / moved["adapter"] < 0.2


def test_groups_land_in_the_optimizer(make_recipe: MakeRecipe) -> None:
    result = train(make_recipe(tune__language={"rate": 0.1}, train__weight_decay=0.5))
    snapshot = result.output / "snapshots" / "step-00000006" / "optimizer.pt"
    groups = torch.load(snapshot, weights_only=True)["param_groups"]
    decay = {group["name"]: group["weight_decay"] for group in groups}
    assert decay["language.decay"] == 0.5 and decay["language.no_decay"] == 0.0
    rates = {group["name"]: group["initial_lr"] for group in groups}
    assert rates["language.decay"] == pytest.approx(0.1 * rates["visual_expert.decay"])
    assert all(group["betas"] == (0.9, 0.95) or group["betas"] == [0.9, 0.95] for group in groups)


def test_first_step_trains_and_cosine_ends_at_zero(make_recipe: MakeRecipe) -> None:
    output = train(make_recipe()).output
    rates = [row["learning_rate"] for row in read_metrics(output / "metrics.jsonl")]
    cosine = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates == pytest.approx([1e-3 * share for share in (0.5, 1.0, *cosine)])
    factor = rate_schedule("cosine", 50, 8000)
    assert factor(0) == pytest.approx(1 / 50)
    assert factor(49) == 1.0 and factor(50) == 1.0
    assert factor(4025) == pytest.approx(0.5)
    assert factor(8000) == pytest.approx(0.0)
    assert rate_schedule("constant_with_warmup", 2, 10)(9) == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_small_rate_moves_nearly_every_entry(
    make_recipe: MakeRecipe, tmp_path: Path, kind: str
) -> None:
    """Hazard: TRL holds what learns in bf16, where lr 1e-5 moves one entry in ten, or in seventy.

    Every part but the embeddings and the tower, from a checkpoint in bf16 to bf16 products.
    """
    base = train(make_recipe(train__output=tmp_path / "base", train__iterations=2)).output
    tuning: dict[str, object] = {"mode": "full"} if kind == "full" else {"mode": "lora", "rank": 4}
    recipe = make_recipe(
        model__config=None,
        model__tokenizer=None,
        model__checkpoint=base,
        model__dtype="bfloat16",
        model__quantize="nf4" if kind == "qlora" else None,
        train__learning_rate=1e-5,
        train__iterations=21,
        train__warmup_iterations=0,
        train__schedule="constant",
        train__micro_batch_size=4,
        train__save_every=1,
        train__keep_snapshots=21,
        tune__language=tuning,
        tune__visual_expert=tuning,
        tune__vision_tower={"mode": "frozen"},
        tune__embeddings={"mode": "frozen"},
    )
    output = train(recipe).output
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    before, after = (load_file(snapshots.snapshot_folder(output, step) / file) for step in (1, 21))
    weights_of = [name for name in before if not name.endswith("inv_freq")]
    learning = [n for n in weights_of if group_of(n) not in ("embeddings", "vision_tower")]
    assert {before[name].dtype for name in learning} == {torch.float32}
    moved = sum((before[name] != after[name]).sum().item() for name in learning)
    assert moved / sum(before[name].numel() for name in learning) > 0.95


def test_trainable_weights_are_held_in_fp32(tiny: dict[str, object]) -> None:
    from cogvlm_sft.checkpoint.load import build_model

    model = build_model(tiny, dtype="bfloat16")
    set_trainable(model, ["visual_expert"])
    hold_trainable_in_fp32(model)
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if group_of(name) == "visual_expert" else torch.bfloat16
        assert parameter.dtype == wanted, name


def test_bf16_run_keeps_fp32_in_snapshots_and_writes_bf16(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    start = train(make_recipe(model__dtype="bfloat16", train__output=tmp_path / "start")).output
    assert {value.dtype for value in weights(start).values()} == {torch.bfloat16}
    recipe = make_recipe(
        model__config=None,
        model__tokenizer=None,
        model__checkpoint=start,
        model__dtype="bfloat16",
        train__iterations=2,
        tune__vision_tower={"mode": "frozen"},
    )
    result = train(recipe)
    masters = weights(result.output / "snapshots" / "step-00000002")
    assert masters["lm_head.weight"].dtype == torch.float32
    assert masters["model.vision.patch_embedding.proj.weight"].dtype == torch.bfloat16
    assert {value.dtype for value in weights(result.output).values()} == {torch.bfloat16}
    config = json.loads((result.output / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "bfloat16"


def test_accumulation_does_not_change_the_result(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    """4 x 1 = 2 x 2 = 1 x 4: the mean is over all supervised tokens of the global batch."""
    losses = []
    for micro in (4, 2, 1):
        output = tmp_path / f"micro{micro}"
        result = train(make_recipe(train__micro_batch_size=micro, train__output=output))
        losses.append([r["loss"] for r in read_metrics(result.output / "metrics.jsonl")])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-6)


def test_same_seed_same_weights_other_seed_other_weights(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    one, two, other = (
        weights(train(make_recipe(train__output=tmp_path / name, train__seed=seed)).output)
        for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    assert same(one, two)
    assert not same(one, other)


def test_every_step_holds_the_global_batch(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """22 conversations, batch 4: stock Trainer would give the sixth step two of them."""
    conversations: Counter[int] = Counter()
    training_step = CogVLMTrainer.training_step

    def count(self: CogVLMTrainer, model: Any, inputs: Any, *rest: Any) -> Any:
        conversations[self.state.global_step] += len(inputs["input_ids"])
        return training_step(self, model, inputs, *rest)

    monkeypatch.setattr(CogVLMTrainer, "training_step", count)
    train(make_recipe(train__iterations=8))
    assert conversations == {step: 4 for step in range(8)}


def test_gradient_checkpointing_gives_the_same_weights(
    make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    plain, checked = (
        weights(
            train(
                make_recipe(train__gradient_checkpointing=on, train__output=tmp_path / f"run{on}")
            ).output
        )
        for on in (False, True)
    )
    for name, value in plain.items():
        torch.testing.assert_close(checked[name], value, atol=1e-6, rtol=1e-5)


def test_head_runs_at_supervised_positions_only(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    labels: list[int] = []
    forward = CogVLMForCausalLM.forward

    def watch(self: CogVLMForCausalLM, *args: object, **kwargs: object) -> object:
        hook = self.lm_head.register_forward_hook(lambda m, i, o: rows.append(i[0].shape[0]))
        labels.append(int((kwargs["labels"][:, 1:] != -100).sum()))  # type: ignore[index]
        try:
            return forward(self, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(CogVLMForCausalLM, "forward", watch)
    train(make_recipe(train__iterations=2))
    assert rows == labels and len(rows) == 4


def test_no_telemetry_is_sent(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    import trl.trainer.base_trainer as base

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("telemetry was sent")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base, "send_telemetry", refuse)
    train(make_recipe(train__iterations=1, train__warmup_iterations=0))


def test_a_loss_that_is_no_number_ends_the_run(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"the loss is (nan|inf), .* at step"):
        train(make_recipe(train__learning_rate=1e30, train__warmup_iterations=0))


def test_a_run_that_diverges_keeps_what_it_logged(make_recipe: MakeRecipe) -> None:
    """Without a snapshot too: its figures are what a reader needs; the same command starts anew."""
    recipe = make_recipe(train__learning_rate=1e18, train__warmup_iterations=0)
    for _ in range(2):
        with pytest.raises(RecipeError, match="start again; no snapshot was written yet"):
            train(recipe)
        rows = read_metrics(recipe.train.output / "metrics.jsonl")
        assert rows[0]["step"] == 1 and len({row["step"] for row in rows}) == len(rows)


def test_held_out_loss_is_the_mean_over_all_supervised_tokens(
    make_recipe: MakeRecipe, world: Path, tmp_path: Path
) -> None:
    """Whatever the batches, and measured as often as the recipe says."""
    measured = []
    for size in (22, 5):
        result = train(
            make_recipe(
                data__validation=world / "train.jsonl",
                evaluate__every=3,
                evaluate__batch_size=size,
                train__output=tmp_path / f"by{size}",
            )
        )
        rows = read_metrics(result.output / "metrics.jsonl")
        held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
        assert [step for step, _ in held_out] == [3, 6], "the last step once"
        assert result.held_out_loss == held_out[-1][1]
        measured.append([loss for _, loss in held_out])
    assert measured[1] == pytest.approx(measured[0], abs=1e-6)


def test_held_out_accuracy_is_what_greedy_decoding_gives(
    make_recipe: MakeRecipe, world: Path
) -> None:
    from cogvlm_sft import read_conversations
    from cogvlm_sft.checkpoint.load import load_model, load_processor
    from cogvlm_sft.evaluation.generate import Request, generate_answers

    recipe = make_recipe(
        data__validation=world / "train.jsonl",
        train__iterations=30,
        train__learning_rate=3e-3,
        train__log_every=20,
        train__global_batch_size=8,
        train__micro_batch_size=8,
    )
    result = train(recipe)
    last = [row for row in read_metrics(result.output / "metrics.jsonl") if "eval_loss" in row][-1]
    rounds = [
        (conversation.images, *conversation.rounds()[0])
        for conversation in read_conversations(world / "train.jsonl")
    ]
    processor = load_processor(result.output)
    answers = generate_answers(
        load_model(result.output),
        processor,
        [
            Request([world / "images" / name for name in images], asked.content, "chat")
            for images, asked, _ in rounds
        ],
    )
    # The tiny vocabulary lacks an "f".
    wanted = [
        processor.tokenizer.decode(
            processor.encode_answer(said.content), skip_special_tokens=True
        ).strip()
        for *_, said in rounds
    ]
    right = [answer == text for answer, text in zip(answers, wanted, strict=True)]
    assert 0.1 < sum(right) / len(right) < 1.0
    assert last["eval_accuracy"] == pytest.approx(sum(right) / len(right))
    assert last["eval_token_accuracy"] >= last["eval_accuracy"]


def test_fixed_prompts_are_answered_while_it_trains(make_recipe: MakeRecipe) -> None:
    prompts = [
        {"question": "What colour is it?", "image": "00.png"},
        {"question": "Is it bright?", "image": None},
    ]
    evaluate = {"every": 2, "prompts": prompts, "max_new_tokens": 4}
    recipe = make_recipe(train__iterations=5)
    tree = recipe.model_dump(mode="json") | {"evaluate": evaluate}
    result = train(recipe_from_dict(tree))
    rows = read_metrics(result.output / "samples.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert [sample["question"] for sample in rows[0]["samples"]] == [p["question"] for p in prompts]
    assert all(isinstance(sample["answer"], str) for row in rows for sample in row["samples"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # dynamo looks at what it traces
def test_a_compiled_run_is_measured_on_the_way(
    make_recipe: MakeRecipe, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out passes and answers have graphs of their own, more than dynamo makes of a layer."""
    counter, before = CompileCounter(), []
    evaluate = CogVLMTrainer.evaluate

    def quick(self: CogVLMDecoderLayer, **options: Any) -> None:
        nn.Module.compile(self, backend=counter, **options)

    def watch(self: CogVLMTrainer, **options: Any) -> dict[str, float]:
        before.append(counter.frame_count)
        found = evaluate(self, **options)
        assert counter.frame_count == before[-1], "compiled for a held-out pass"
        return found

    torch._dynamo.reset()
    monkeypatch.setattr(CogVLMDecoderLayer, "compile", quick)
    monkeypatch.setattr(CogVLMTrainer, "evaluate", watch)
    prompts = [{"question": "What colour is it?", "image": "00.png"}, {"question": "And now?"}]
    recipe = make_recipe(
        data__validation=world / "train.jsonl",
        evaluate__every=2,
        evaluate__batch_size=3,
        evaluate__prompts=prompts,
        train__compile=True,
        train__gradient_checkpointing=True,
    )
    output = train(recipe).output
    assert len((output / "samples.jsonl").read_text().splitlines()) == 3
    assert before and before[0] > 0
    torch._dynamo.reset()
