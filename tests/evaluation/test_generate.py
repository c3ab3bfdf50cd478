"""Batched answers equal single ones, and the order is kept."""

from pathlib import Path

import numpy
import pytest
from PIL import Image

from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.generate import Request, generate_answers
from cogvlm_sft.model import CogVLMForCausalLM, CogVLMProcessor

Tiny = tuple[CogVLMForCausalLM, CogVLMProcessor]


def _picture(seed: int) -> Image.Image:
    pixels = numpy.random.default_rng(seed).integers(0, 256, (30, 30, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def _requests() -> list[Request]:
    asked = ["What digit is this?", "Where is the red square?", "7", "Which, and why? " * 4]
    requests = []
    for number in range(50):
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
    batched = generate_answers(*tiny, requests, batch_size=8, max_new_tokens=8)
    single = [generate_answers(*tiny, [one], max_new_tokens=8)[0] for one in requests]
    assert batched == single
    # A model that ignores its prompts would pass the line above.
    assert len(set(single)) > 3


def test_one_picture_is_computed_once_for_all_its_questions(tiny: Tiny) -> None:
    model = tiny[0]
    asked = ["What digit is this?", "Where is the red square?", "7", "Which, and why? " * 4]
    pictures = [_picture(1), _picture(2)]
    requests = [
        Request((pictures[number % 2],), asked[number // 2 % 4], ("chat", "vqa")[number // 8])
        for number in range(16)
    ]
    single = [generate_answers(*tiny, [one], max_new_tokens=8)[0] for one in requests]
    seen: list[int] = []
    hook = model.model.vision.register_forward_pre_hook(
        # Without pictures the adapter still runs, on none.
        lambda module, inputs: None if inputs[0] is None else seen.append(inputs[0].shape[0])
    )
    try:
        together = generate_answers(*tiny, requests, batch_size=16, max_new_tokens=8)
        assert seen == [2]
        seen.clear()
        assert generate_answers(*tiny, requests, batch_size=8, max_new_tokens=8) == together
        assert seen == [1, 1]
        # A caption prompt has no words behind its picture, so its picture is computed with it.
        caption = Request((pictures[0],), "", "base")
        mixed = generate_answers(*tiny, [*requests[:3], caption], batch_size=4, max_new_tokens=8)
    finally:
        hook.remove()
    assert together == single
    assert len(set(single)) > 3
    assert mixed == [*single[:3], *generate_answers(*tiny, [caption], max_new_tokens=8)]


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
