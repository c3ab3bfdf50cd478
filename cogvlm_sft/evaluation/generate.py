"""Answers for many questions: batched, left-padded, sorted by length, in the order asked.

Notable choices: requests are sorted by prompt length before they are cut into batches, so that
little padding is computed; a picture goes through the vision tower once, with its prompt, and its
keys and values stay in the cache while the answer grows; an answer ends at EOS and its text is
stripped. Padding on the left does not change greedy answers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

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
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]["input_ids"]))
    sampling = {"temperature": temperature, "top_p": top_p} if do_sample else {}
    answers = [""] * len(requests)
    with evaluation_mode(model), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            inputs = _batch(processor, [prompts[i] for i in chosen], [requests[i] for i in chosen])
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
            output = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                do_sample=do_sample,
                pad_token_id=processor.tokenizer.pad_token_id,
                eos_token_id=processor.tokenizer.eos_token_id,
                **sampling,
            )
            fresh = output[:, inputs["input_ids"].shape[1] :]
            texts = processor.tokenizer.batch_decode(fresh, skip_special_tokens=True)
            for index, text in zip(chosen, texts, strict=True):
                answers[index] = text.strip()
            if on_batch is not None:
                on_batch(len(chosen))
    return answers


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
    processor: CogVLMProcessor, prompts: list[dict[str, list[int]]], requests: list[Request]
) -> dict[str, torch.Tensor]:
    inputs = processor.pad(prompts, side="left")
    pictures = [open_picture(source) for request in requests for source in request.images]
    if pictures:
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        inputs["pixel_values"] = pixels
    return inputs
