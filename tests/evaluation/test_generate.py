"""Batched answers equal single ones, the order is kept, and scores come out of a build right."""

import json
from pathlib import Path

import numpy
import pytest
from PIL import Image

from cogvlm_sft.conversation import Conversation, Turn, write_conversations
from cogvlm_sft.errors import CheckpointError, DataError
from cogvlm_sft.evaluation.generate import Request, generate_answers
from cogvlm_sft.evaluation.run import evaluate_checkpoint, evaluate_model
from cogvlm_sft.evaluation.tasks import find_task
from cogvlm_sft.model import CogVLMForCausalLM, CogVLMProcessor

Tiny = tuple[CogVLMForCausalLM, CogVLMProcessor]


def _picture(seed: int) -> Image.Image:
    pixels = numpy.random.default_rng(seed).integers(0, 256, (30, 30, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def _requests() -> list[Request]:
    asked = ["What digit is this?", "Where is the red square?", "7", "Which, and why? " * 4]
    requests = []
    for number in range(14):
        question = asked[number % 4]
        if number % 5 == 4:
            requests.append(Request((), question))
        elif number % 5 == 3:
            history = (("What digit is this?", "7"),)
            requests.append(Request((_picture(number),), question, "chat", history))
        else:
            style = ("chat", "vqa", "base")[number % 3]
            requests.append(Request((_picture(number),), question, style))
    return requests


def test_batched_equals_one_by_one_in_the_order_asked(tiny: Tiny) -> None:
    requests = _requests()
    batched = generate_answers(*tiny, requests, batch_size=5, max_new_tokens=8)
    single = [generate_answers(*tiny, [one], max_new_tokens=8)[0] for one in requests]
    assert batched == single
    # A model that ignores its prompts would pass the line above.
    assert len(set(single)) > 3


def test_the_picture_matters(tiny: Tiny) -> None:
    one, other = (
        generate_answers(*tiny, [Request((_picture(seed),), "7", "base")], max_new_tokens=8)
        for seed in (1, 2)
    )
    assert one != other


def test_training_mode_is_given_back(tiny: Tiny) -> None:
    model, processor = tiny
    model.train()
    generate_answers(model, processor, [Request((), "7")], max_new_tokens=1)
    assert model.training


def test_no_requests_give_no_answers(tiny: Tiny) -> None:
    assert generate_answers(*tiny, []) == []


def test_a_missing_and_a_damaged_picture_are_named(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.png does not exist"):
        generate_answers(*tiny, [Request((tmp_path / "nowhere.png",), "7")])
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(DataError, match=r"text\.png"):
        generate_answers(*tiny, [Request((text,), "7")])


def _build(tmp_path: Path, answers: list[str]) -> Path:
    conversations = []
    for number, answer in enumerate(answers):
        _picture(number).save(tmp_path / f"{number}.png")
        turns = (Turn("user", "<image>\nWhat digit is this?"), Turn("assistant", answer))
        conversations.append(Conversation(f"c{number}", "t", "chat", (f"{number}.png",), turns))
    write_conversations(tmp_path / "held.jsonl", conversations)
    return tmp_path / "held.jsonl"


def test_score_is_the_share_of_right_answers(tiny: Tiny, tmp_path: Path) -> None:
    build = _build(tmp_path, ["never this"] * 4)
    requests = [Request((tmp_path / f"{n}.png",), "What digit is this?", "chat") for n in range(4)]
    own = generate_answers(*tiny, requests, max_new_tokens=find_task("exact_match").max_new_tokens)
    build = _build(tmp_path, [own[0], "never this", own[2], "nor this"])
    predictions = tmp_path / "predictions.jsonl"
    report = evaluate_model(*tiny, build, tmp_path, "exact_match", batch_size=3, output=predictions)
    assert (report["accuracy"], report["count"]) == (0.5, 4)
    rows = [json.loads(line) for line in predictions.read_text(encoding="utf-8").splitlines()]
    assert [row["right"] for row in rows] == [True, False, True, False]
    assert [row["prediction"] for row in rows] == own


def test_evaluate_checkpoint_loads_and_limits(checkpoint: Path, tmp_path: Path) -> None:
    build = _build(tmp_path, ["7", "8", "9"])
    report = evaluate_checkpoint(checkpoint, build, tmp_path, "exact_match", limit=2)
    assert report["count"] == 2
    assert report["checkpoint"] == str(checkpoint)


def test_mistakes_are_named(checkpoint: Path, tmp_path: Path) -> None:
    build = _build(tmp_path, ["7"])
    with pytest.raises(DataError, match="did you mean 'exact_match'"):
        evaluate_checkpoint(checkpoint, build, tmp_path, "exact_mach")
    with pytest.raises(CheckpointError):
        evaluate_checkpoint(tmp_path / "none", build, tmp_path, "exact_match")
    with pytest.raises(DataError, match="holds no box"):
        evaluate_checkpoint(checkpoint, build, tmp_path, "box_iou")
    with pytest.raises(DataError, match="limit is 0"):
        evaluate_checkpoint(checkpoint, build, tmp_path, "exact_match", limit=0)
