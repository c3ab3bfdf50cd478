"""Batched answers equal single ones, and the order is kept."""

from pathlib import Path

import numpy
import pytest
from PIL import Image
from transformers import GenerationConfig

from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.generate import Request, end_tokens, generate_answers
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


def test_the_decoding_is_the_one_stated_whatever_the_checkpoint_says(tiny: Tiny) -> None:
    model = tiny[0]
    kept = model.generation_config
    plain = generate_answers(*tiny, _requests()[:8], max_new_tokens=8)
    try:
        model.generation_config = GenerationConfig(
            repetition_penalty=50.0, min_new_tokens=8, do_sample=True, temperature=2.0
        )
        assert generate_answers(*tiny, _requests()[:8], max_new_tokens=8) == plain
        assert model.generation_config.repetition_penalty == 50.0
    finally:
        model.generation_config = kept


def test_an_answer_ends_at_every_end_that_the_checkpoint_names(tiny: Tiny) -> None:
    model, processor = tiny
    kept = model.generation_config
    prompts = processor.pad([processor.encode_prompt("What digit is this?", num_images=0)])
    first = int(model.generate(**prompts, max_new_tokens=1)[0, -1])
    request = [Request((), "What digit is this?")]
    assert len(generate_answers(*tiny, request, max_new_tokens=8)[0]) > 1
    try:  # as CogVLM2's, which names <|end_of_text|> and <|eot_id|>
        model.generation_config = GenerationConfig(eos_token_id=[2, first])
        assert end_tokens(model, processor) == sorted([2, first])
        assert len(generate_answers(*tiny, request, max_new_tokens=8)[0]) <= 1
    finally:
        model.generation_config = kept


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
