"""Answers for many questions: batched, left-padded, sorted by length, in the order asked.

Notable choices: requests are sorted by prompt length before they are cut into batches, so that
little padding is computed, and those about one picture stand together: the picture is computed once
for all of them in a batch, and its keys and values are handed to each. An answer ends at EOS and
its text is stripped. Neither padding nor sharing changes greedy answers, and what a checkpoint's
generation_config.json asks for (a penalty, a least length) is not applied: a figure is comparable
only where the decoding is the one that it states.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig

from cogvlm_sft.data.pictures import read_picture
from cogvlm_sft.errors import DataError
from cogvlm_sft.model import CogVLMForCausalLM, CogVLMProcessor


@dataclass(frozen=True, slots=True)
class Request:
    """One question.

    Attributes:
        images: Pictures, or paths of them; empty for a question about nothing but text.
        question: May hold `<image>` markers; without any, a picture stands before the text.
        style: Prompt template; None takes the processor's, or `text` without pictures.
        history: Earlier (question, answer) pairs.
    """

    images: Sequence[Image.Image | Path | str]
    question: str
    style: str | None = None
    history: tuple[tuple[str, str], ...] = ()


def generate_answers(
    model: CogVLMForCausalLM,
    processor: CogVLMProcessor,
    requests: Sequence[Request],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """Answers in the order of the requests.

    Args:
        model: Put into evaluation mode for the call and back afterwards.
        processor: The model's own.
        requests: Questions of any length, with and without pictures.
        batch_size: Questions generated at once.
        max_new_tokens: Longest answer, EOS included.
        num_beams: 1 is greedy unless `do_sample`.
        do_sample: Draw from the distribution; `temperature` and `top_p` apply to it alone.
        on_batch: Called after each batch with the number of answers in it.

    Raises:
        DataError: A picture cannot be read, or a count below 1.
        ModelInputError: Markers and pictures of a request do not match.
    """
    for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise DataError(f"{name} is {value}, expected 1 or more")
    prompts = [
        processor.encode_prompt(
            request.question,
            history=request.history,
            num_images=len(request.images),
            style=request.style,
        )
        for request in requests
    ]
    order = _in_batches(prompts, [_leading_picture(request) for request in requests])
    sampling = {"temperature": temperature, "top_p": top_p} if do_sample else {}
    answers = [""] * len(requests)
    ends = end_tokens(model, processor)
    with evaluation_mode(model), stated_decoding(model), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [prompts[i] for i in chosen], [requests[i] for i in chosen]
            # Beams would have to take the keys and values along; transformers does not.
            shared = num_beams == 1 and _shares_pictures(*batch, processor.num_image_tokens)
            inputs = (_prefilled if shared else _batch)(model, processor, *batch)
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=do_sample,
                pad_token_id=processor.tokenizer.pad_token_id,
                eos_token_id=ends,
                **sampling,
            )
            fresh = output[:, inputs["input_ids"].shape[1] :]
            texts = processor.tokenizer.batch_decode(fresh, skip_special_tokens=True)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text.strip()
            if on_batch is not None:
                on_batch(len(chosen))
    return answers


def end_tokens(model: CogVLMForCausalLM, processor: CogVLMProcessor) -> list[int]:
    """Ids that end an answer: the tokenizer's EOS, and those the checkpoint names.

    CogVLM2's checkpoint names two, of which Llama-3's tokenizer knows one as its EOS.
    """
    named = model.generation_config.eos_token_id
    ids = named if isinstance(named, list) else [] if named is None else [named]
    return sorted({processor.tokenizer.eos_token_id, *ids})


@contextmanager
def stated_decoding(model: CogVLMForCausalLM) -> Iterator[None]:
    """Inside, `generate` does what its arguments say and nothing besides."""
    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, the former mode afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def open_picture(source: Image.Image | Path | str) -> Image.Image:
    """A picture in RGB, upright.

    Raises:
        DataError: There is no such file, or it is not a whole picture.
    """
    if isinstance(source, Image.Image):
        return source
    path = Path(source)
    if not path.is_file():
        raise DataError(
            f"image {path} does not exist; give the path of a picture file "
            f"(the working directory is {Path.cwd()})"
        )
    return read_picture(path, "question")


def _batch(
    model: CogVLMForCausalLM,
    processor: CogVLMProcessor,
    prompts: list[dict[str, list[int]]],
    requests: list[Request],
) -> dict[str, Any]:
    """Inputs of `generate` for prompts with any pictures."""
    inputs: dict[str, Any] = dict(processor.pad(prompts, side="left"))
    pictures = [source for request in requests for source in request.images]
    if pictures:
        inputs["pixel_values"] = _pixels(processor, pictures).to(model.dtype)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _prefilled(
    model: CogVLMForCausalLM,
    processor: CogVLMProcessor,
    prompts: list[dict[str, list[int]]],
    requests: list[Request],
) -> dict[str, Any]:
    """Inputs of `generate` with the pictures' keys and values in the cache already.

    A row is BOS and the picture's block, padding, and the words. Padding between them counts no
    position and is seen by nobody.
    """
    head = processor.num_image_tokens + 1  # BOS, and the block from boi to eoi
    first: dict[object, int] = {}
    for row, request in enumerate(requests):
        first.setdefault(_leading_picture(request), row)
    prefixes = [{name: column[:head] for name, column in prompts[row].items()}
                for row in first.values()]  # fmt: skip
    inputs = {name: t.to(model.device) for name, t in processor.pad(prefixes, side="left").items()}
    pixels = _pixels(processor, [requests[row].images[0] for row in first.values()])
    cache = model(
        **inputs,
        pixel_values=pixels.to(model.device, model.dtype),
        use_cache=True,
        logits_to_keep=1,
    ).past_key_values
    numbers = {picture: number for number, picture in enumerate(first)}
    places = torch.tensor([numbers[_leading_picture(request)] for request in requests])
    cache.batch_select_indices(places.to(model.device))
    words = processor.pad(
        [{name: column[head:] for name, column in prompt.items()} for prompt in prompts],
        side="left",
    )
    joined = {
        name: torch.cat((inputs[name][places.to(model.device)], words[name].to(model.device)), 1)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    return {**joined, "past_key_values": cache}


def _pixels(processor: CogVLMProcessor, pictures: list[Image.Image | Path | str]) -> torch.Tensor:
    """(pictures, 3, S, S)."""
    opened = [open_picture(source) for source in pictures]
    return processor.image_processor(opened, return_tensors="pt")["pixel_values"]


def _leading_picture(request: Request) -> object:
    """What tells a request's first picture from others: its path, or the object in memory."""
    if not request.images:
        return None
    first = request.images[0]
    return id(first) if isinstance(first, Image.Image) else str(first)


def _shares_pictures(
    prompts: list[dict[str, list[int]]], requests: list[Request], image_tokens: int
) -> bool:
    """Whether some of these one-picture prompts have a picture in common, and words behind it."""
    head = image_tokens + 1
    fits = all(
        len(request.images) == 1
        and len(prompt["input_ids"]) > head
        and prompt["token_type_ids"][1:head] == [1] * image_tokens
        for prompt, request in zip(prompts, requests, strict=True)
    )
    return fits and len({_leading_picture(request) for request in requests}) < len(requests)


def _in_batches(prompts: list[dict[str, list[int]]], pictures: list[object]) -> list[int]:
    """Order of the requests: long ones first, and each together with the others of its picture."""
    longest: dict[object, int] = {}
    for prompt, picture in zip(prompts, pictures, strict=True):
        longest[picture] = max(longest.get(picture, 0), len(prompt["input_ids"]))
    numbers = {picture: number for number, picture in enumerate(longest)}

    def key(index: int) -> tuple[int, int, int]:
        length, picture = len(prompts[index]["input_ids"]), pictures[index]
        if picture is None:
            return -length, -1, 0
        return -longest[picture], numbers[picture], -length

    return sorted(range(len(prompts)), key=key)
