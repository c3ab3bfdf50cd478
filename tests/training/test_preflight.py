"""What is looked for before anything is loaded, and what the estimate says."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cogvlm_sft import CheckpointError, DataError, Recipe, RecipeError, load_recipe, train
from cogvlm_sft.checkpoint.load import (
    build_model,
    load_model,
    load_processor,
    make_config,
    save_checkpoint,
)
from cogvlm_sft.training import preflight
from cogvlm_sft.training.estimate import GIB, model_config

MakeRecipe = Callable[..., Recipe]


def test_chat_says_in_one_message_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(preflight, "available_memory", lambda world: (32.0 * GIB, "cpu"))

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("cogvlm_sft.training.run.load_model", refuse)
    with pytest.raises(RecipeError) as caught:
        train(load_recipe("chat"))
    message = str(caught.value)
    for part in (
        "model.checkpoint: checkpoint folder checkpoints/cogvlm-base-490-hf does not exist",
        "model.tokenizer: folder checkpoints/vicuna-7b-v1.5 does not exist",
        "data.train.0.path: builds/chat_500k",
        "data.image_root: folder data does not exist",
        "memory: about ",
        "32.0 GiB available",
    ):
        assert part in message, message
    assert not (tmp_path / "runs").exists()


def test_one_thing_missing_is_one_line(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        train(make_recipe(data__image_root=tmp_path / "nowhere"))
    assert "\n" not in str(caught.value) and "data.image_root" in str(caught.value)


def test_memory_that_does_not_suffice(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "available_memory", lambda world: (0.01 * GIB, "cpu"))
    with pytest.raises(RecipeError, match=r"memory: about .* GiB available"):
        train(make_recipe())


def test_max_length_below_an_image(make_recipe: MakeRecipe) -> None:
    with pytest.raises(RecipeError, match=r"max_length: 7 is below .* \(6 tokens"):
        train(make_recipe(data__max_length=7))


def test_unknown_configuration_field(make_recipe: MakeRecipe, tiny: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=r"'hiden_size'; did you mean 'hidden_size'"):
        train(make_recipe(model__config={**tiny, "hiden_size": 64}))


def test_a_bad_conversation_leaves_no_output(
    make_recipe: MakeRecipe, world: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.jsonl"
    lines = (world / "train.jsonl").read_text().splitlines()
    lines[3] = lines[3].replace("03.png", "missing.png")
    bad.write_text("\n".join(lines))
    recipe = make_recipe(data__train=[{"path": str(bad)}])
    with pytest.raises(DataError, match=r"bad\.jsonl:4"):
        train(recipe)
    assert not recipe.train.output.exists()


def test_a_failure_before_the_first_snapshot_leaves_no_output(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cogvlm_sft.data.collator import CogVLMCollator

    def fail(self: CogVLMCollator, items: object) -> object:
        raise DataError("broken later")

    monkeypatch.setattr(CogVLMCollator, "__call__", fail)
    recipe = make_recipe()
    with pytest.raises(DataError, match="broken later"):
        train(recipe)
    assert not recipe.train.output.exists()


@pytest.fixture
def checkpoint(tiny: dict[str, object], world: Path, tmp_path: Path) -> Path:
    from cogvlm_sft.checkpoint.load import build_processor

    processor = build_processor(make_config(tiny), world / "tokenizer")
    return save_checkpoint(build_model(tiny), processor, tmp_path / "checkpoint")


def test_checkpoint_round_trip(checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(checkpoint)
    again = load_model(save_checkpoint(model, load_processor(checkpoint), tmp_path / "again"))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        save_checkpoint(model, load_processor(checkpoint), tmp_path / "again")


def test_training_from_a_checkpoint_starts_with_its_weights(
    make_recipe: MakeRecipe, checkpoint: Path
) -> None:
    recipe = make_recipe(
        model__config=None,
        model__tokenizer=None,
        model__checkpoint=checkpoint,
        train__learning_rate=1e-8,
        train__iterations=1,
        train__warmup_iterations=0,
    )
    trained = load_model(train(recipe).output).state_dict()
    for name, value in load_model(checkpoint).state_dict().items():
        torch.testing.assert_close(trained[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda f: shutil.rmtree(f), "does not exist"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "as JSON"),
        (lambda f: (f / "config.json").write_text("{}"), "not a CogVLM"),
        (lambda f: (f / "model.safetensors").unlink(), "holds no weights"),
        (
            lambda f: (f / "model.safetensors").write_bytes(
                (f / "model.safetensors").read_bytes()[:-9]
            ),
            "damaged or incomplete",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            "pickled",
        ),
    ],
)
def test_damaged_checkpoints(checkpoint: Path, harm: Callable[[Path], object], words: str) -> None:
    harm(checkpoint)
    with pytest.raises(CheckpointError, match=words):
        load_model(checkpoint)


def test_missing_and_unexpected_weights_are_named(checkpoint: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = checkpoint / "model.safetensors"
    state = load_file(file)
    state["model.norm.bias"] = state.pop("model.norm.weight")
    state["lm_head.weight"] = state["lm_head.weight"][:10].clone()
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError) as caught:
        load_model(checkpoint)
    for word in ("1 missing (model.norm.weight", "1 unexpected (model.norm.bias", "1 misshapen"):
        assert word in str(caught.value)


def test_missing_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_processor(checkpoint)


def test_a_shortage_of_pictures_is_counted(
    make_recipe: MakeRecipe, world: Path, tmp_path: Path
) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for name in ("00.png", "01.png"):
        shutil.copy(world / "images" / name, few)
    with pytest.raises(DataError, match=r"02\.png.*20 of 22 pictures are missing"):
        train(make_recipe(data__image_root=few))


def test_many_gpus_want_a_launcher(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hazard: TRL refuses nn.DataParallel, which transformers takes where it sees several GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(RecipeError, match="8 GPUs are seen by one process"):
        train(make_recipe())


def test_bfloat16_wants_a_gpu_that_has_it(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first step would fail, in a flash kernel. The process sees its own GPU alone."""
    first = {"cuda:0": (7, 0)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda own: first[own])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda own: "Tesla V100-SXM2-32GB")
    monkeypatch.setattr(preflight, "available_memory", lambda world: (32.0 * GIB, "cuda"))
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(RecipeError, match=r"a Tesla V100-SXM2-32GB of 7\.0\. Set it to float32"):
        train(make_recipe(model__dtype="bfloat16"))


def test_only_the_second_fsdp_and_its_shards(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match="FSDP version 1 with SHARDED_STATE_DICT"):
        train(make_recipe())
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    with pytest.raises(RecipeError, match="FSDP version 2 with FULL_STATE_DICT"):
        train(make_recipe())


@pytest.mark.parametrize("launcher", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_what_cannot_be_split_is_said_before_weights_are_read(
    make_recipe: MakeRecipe, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    """Hazard: 8-bit moments and 4-bit weights come in blocks that a split tensor does not have."""
    monkeypatch.setenv(launcher, "true")
    frozen = {"mode": "frozen"}
    recipe = make_recipe(
        model__config=None,
        model__tokenizer=None,
        model__checkpoint=checkpoint,
        model__quantize="nf4",
        tune__language=frozen,
        tune__visual_expert=frozen,
        train__optimizer="paged_adamw_8bit",
    )
    with pytest.raises(RecipeError) as caught:
        train(recipe)
    for part in ("train.optimizer: paged_adamw_8bit", "model.quantize: FSDP2", "ddp.yaml"):
        assert part in str(caught.value)
    assert not recipe.train.output.exists()


@pytest.mark.parametrize(
    ("launcher", "folder", "words"),
    [
        ("ACCELERATE_USE_FSDP", "other", "without FSDP, this one is with"),
        ("ACCELERATE_USE_DEEPSPEED", "other", "without DeepSpeed, this one is with"),
        ("OTHER", "global_step6", "with DeepSpeed, this one is without"),
    ],
)
def test_a_snapshot_of_another_launcher_is_said_before_weights_are_read(
    make_recipe: MakeRecipe,
    monkeypatch: pytest.MonkeyPatch,
    launcher: str,
    folder: str,
    words: str,
) -> None:
    """Hazard: transformers ends with a ValueError, after the weights were loaded."""
    recipe = make_recipe()
    output = train(recipe).output
    (output / "config.json").unlink()
    (output / "snapshots" / "step-00000006" / folder).mkdir()
    monkeypatch.setenv(launcher, "true")
    with pytest.raises(RecipeError, match=words):
        train(recipe)


def test_a_service_that_is_not_installed(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"report_to: .*pip install wandb"):
        train(make_recipe(train__report_to="wandb"))


def test_each_process_looks_at_the_memory_of_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda own: (10 * int(own[-1]), 80))
    for name, seen in (("3", 30.0), ("0", 0.0), ("11", 30.0)):
        monkeypatch.setenv("LOCAL_RANK", name)
        assert preflight.available_memory(8) == (seen, "cuda")


@pytest.mark.parametrize(("stage", "fits"), [("2", False), ("3", True)])
def test_memory_is_judged_by_the_launchers_stage(
    monkeypatch: pytest.MonkeyPatch, stage: str, fits: bool
) -> None:
    """ZeRO-2 holds all weights on every GPU, ZeRO-3 a part of them."""
    recipe = load_recipe("chat")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    monkeypatch.setattr(preflight, "available_memory", lambda world: (50.0 * GIB, "cuda"))
    found = preflight._memory_short(recipe, model_config(recipe)[0], 8)
    assert (not found) == fits, found


def test_flex_attention_does_not_train_on_a_cpu(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RecipeError, match=r"flex_attention has no backward pass on a CPU; set sdp"):
        train(make_recipe(model__attention="flex_attention"))


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ({"question": "<image><image>?", "image": "00.png"}, r"prompts\.1: 2 <image> marker"),
        ({"question": "<image>?"}, r"prompts\.1: 1 <image> marker"),
        ({"question": "What?", "image": "00.png", "style": "text"}, "style 'text' takes no image"),
        ({"question": "What?", "image": "cut.png"}, r"prompts\.1: image .*cut\.png cannot be de"),
        ({"question": "What?", "image": "none.png"}, r"prompts\.1: image 'none\.png' is missing"),
    ],
)
def test_prompts_are_looked_at_before_weights_are_read(
    make_recipe: MakeRecipe,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prompt: dict[str, str],
    words: str,
) -> None:
    """They may first be asked hours later."""
    images = tmp_path / "images"
    shutil.copytree(world / "images", images)
    (images / "cut.png").write_bytes((images / "00.png").read_bytes()[:50])
    monkeypatch.delattr("cogvlm_sft.training.run.load_model")
    recipe = make_recipe(
        data__image_root=images,
        evaluate__every=2,
        evaluate__prompts=[{"question": "What colour is it?", "image": "00.png"}, prompt],
    )
    with pytest.raises((RecipeError, DataError), match=words):
        train(recipe)
    assert not recipe.train.output.exists()


def test_flash_attention_wants_its_package(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"model\.attention: flash_attention_2 needs .* set sdpa"):
        train(make_recipe(model__attention="flash_attention_2"))
