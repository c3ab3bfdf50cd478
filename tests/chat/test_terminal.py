"""The one-shot question and the loop, on a tiny checkpoint with random weights."""

import io
from pathlib import Path

import pytest
from PIL import Image

from cogvlm_sft.chat.terminal import ask, open_chat, run_loop
from cogvlm_sft.checkpoint.load import build_model, build_processor, save_checkpoint
from cogvlm_sft.demo.tokenizer import train_tokenizer
from cogvlm_sft.errors import CheckpointError, DataError

CONFIG = {
    "vocab_size": 330,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "num_positions": 5,
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    folder = train_tokenizer(["What digit is this? 7 "] * 20, root / "tokenizer", vocabulary=330)
    model = build_model(CONFIG)
    return save_checkpoint(model, build_processor(model.config, folder), root / "model")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    return tmp_path / "red.png"


def test_one_question_one_answer(checkpoint: Path, picture: Path) -> None:
    answer = ask(checkpoint, picture, "What digit is this?", max_new_tokens=4)
    assert isinstance(answer, str)
    assert answer == ask(checkpoint, picture, "What digit is this?", max_new_tokens=4)


def test_mistakes_are_clear(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png does not exist"):
        ask(checkpoint, tmp_path / "none.png", "What?")
    with pytest.raises(CheckpointError, match="does not exist"):
        ask(tmp_path / "none", picture, "What?")
    with pytest.raises(DataError, match="question is empty"):
        ask(checkpoint, picture, "  ")
    cut = tmp_path / "cut.png"
    cut.write_bytes(picture.read_bytes()[:60])
    with pytest.raises(DataError, match=r"cut\.png"):
        ask(checkpoint, cut, "What?")


def test_the_loop_keeps_history_and_survives_mistakes(checkpoint: Path, picture: Path) -> None:
    chat = open_chat(checkpoint, max_new_tokens=3)
    said: list[str] = []
    lines = [
        "/image nowhere.png",
        f"/image {picture}",
        "What digit is this?",
        "",
        "7?",
        "/what",
        "/quit",
        "never reached",
    ]
    run_loop(chat, io.StringIO("\n".join(lines)), said.append)
    assert "nowhere.png does not exist" in said[1]
    assert said[2].startswith("looking at")
    assert [question for question, _ in chat.history] == ["What digit is this?", "7?"]
    assert "unknown command '/what'" in said[-1]


def test_history_changes_the_prompt(checkpoint: Path, picture: Path) -> None:
    chat = open_chat(checkpoint, max_new_tokens=3)
    chat.show(picture)
    seen: list[int] = []
    encode = chat.processor.encode_prompt

    def spy(question: str, **keywords: object) -> dict[str, list[int]]:
        prompt: dict[str, list[int]] = encode(question, **keywords)  # type: ignore[arg-type]
        seen.append(len(prompt["input_ids"]))
        return prompt

    chat.processor.encode_prompt = spy  # type: ignore[method-assign]
    chat.say("7?")
    chat.say("7?")
    chat.reset()
    assert chat.picture is None and chat.history == []
    assert seen[1] > seen[0]


def test_the_end_of_the_input_ends_the_loop(checkpoint: Path) -> None:
    run_loop(open_chat(checkpoint, max_new_tokens=2), io.StringIO("7?\n"), lambda line: None)
