"""Every recipe at demo scale, for two steps each, from the demo's own raw files."""

from pathlib import Path

import pytest

from cogvlm_sft.cli import main
from cogvlm_sft.demo.corpus import Sizes, make_corpus
from cogvlm_sft.demo.run import HOME, training_texts
from cogvlm_sft.demo.tokenizer import train_tokenizer
from cogvlm_sft.recipe import load_recipe
from cogvlm_sft.recipe.files import packaged_recipes, training_recipes
from cogvlm_sft.training.telemetry import read_metrics

DEMO = [name for name in training_recipes() if name.startswith("demo/")]
DATA = ("pretrain_data", "data", "vqa_data", "grounding_data", "captcha_data", "caption_data")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's pictures, tokenizer and builds, a tenth of a percent of the size."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        examples = make_corpus(HOME, Sizes(digit_copies=1, signs=60, shapes=60, photo_crops=2))
        train_tokenizer(training_texts(examples), HOME / "tokenizer")
        for name in (*DATA, "referring_data"):
            path = packaged_recipes()[f"demo/{name}"]
            assert main(["data", "build", str(path)]) == 0
    return folder


def started_from(name: str) -> str | None:
    """The demo recipe whose checkpoint a recipe starts from."""
    checkpoint = load_recipe(name).model.checkpoint
    return None if checkpoint is None else f"demo/{checkpoint.name}"


def trained(name: str, folder: Path) -> Path:
    """The output of a recipe, trained for two steps unless it was before."""
    output = load_recipe(name).train.output
    before = started_from(name)
    if before is not None:
        trained(before, folder)
    if not (output / "README.md").is_file():
        short = ["iterations=2", "warmup_iterations=1", "log_every=1", "global_batch_size=4"]
        overrides = [f"train.{setting}" for setting in (*short, "micro_batch_size=4")]
        assert main(["train", name, *overrides]) == 0
    return output


@pytest.mark.slow
@pytest.mark.parametrize("name", DEMO)
def test_it_trains(name: str, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    output = trained(name, demo)
    assert [row["step"] for row in read_metrics(output / "metrics.jsonl")] == [1, 2]
    assert (output / "README.md").is_file()


@pytest.mark.slow
def test_the_second_half_sees_larger_pictures(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cogvlm_sft.checkpoint.load import load_config, load_processor

    monkeypatch.chdir(demo)
    small, large = (
        trained(f"demo/pretrain_grounding_{size}", demo).resolve() for size in (224, 490)
    )
    assert load_config(small).vision_config.image_size == 56
    assert load_config(large).vision_config.image_size == 112
    assert load_config(large).vision_config.num_positions == 65
    assert load_processor(large).num_image_tokens == 66
