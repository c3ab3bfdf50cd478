"""A conversation with one loaded model: asked whole each time, answered piece by piece.

The history goes into the released template as the model has seen it in training. Notable choices:
a new picture begins a new conversation, because the model has seen one picture a conversation in
its alignment; an answer that is broken off is not remembered; a prompt that does not fit the
model's positions is refused with both numbers, since the model would answer nonsense.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from cogvlm_sft.chat.limits import check_question, read_upload
from cogvlm_sft.checkpoint.load import load_processor
from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.generate import end_tokens, evaluation_mode, stated_decoding
from cogvlm_sft.evaluation.loading import open_model
from cogvlm_sft.model import CogVLMForCausalLM, CogVLMProcessor
from cogvlm_sft.model.token_layout import build_position_ids


@dataclass(frozen=True, slots=True)
class Decoding:
    """How an answer is drawn.

    Attributes:
        max_new_tokens: Longest answer.
        temperature: 0 is greedy; above it, samples are drawn with it.
        top_p: Share of probability that samples are drawn from.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 0.9


@dataclass(slots=True)
class Chat:
    """A conversation.

    Attributes:
        model, processor: Of one checkpoint.
        style: Prompt template; None takes the checkpoint's own.
        decoding: How answers are drawn.
        picture: What the conversation is about, or None.
        history: (question, answer) pairs so far.
    """

    model: CogVLMForCausalLM
    processor: CogVLMProcessor
    style: str | None = None
    decoding: Decoding = field(default_factory=Decoding)
    picture: Image.Image | None = None
    history: list[tuple[str, str]] = field(default_factory=list)

    def show(self, path: Path | str) -> None:
        """Begins a new conversation about a picture.

        Raises:
            DataError: There is no such picture; the conversation goes on as it was.
        """
        self.picture = read_upload(Path(path))
        self.history.clear()

    def reset(self) -> None:
        """Forgets the conversation and the picture."""
        self.picture = None
        self.history.clear()

    def say(self, question: str) -> str:
        """Asks, and remembers the round; see `answer`."""
        return "".join(self.answer(question))

    def answer(self, question: str) -> Iterator[str]:
        """Asks; the answer comes in pieces while it is made, and is remembered at its end.

        Closing the iterator stops the model.

        Raises:
            DataError: The question is empty, too long, or holds a marker of the prompts.
        """
        asked = check_question(question)
        inputs, room = self._inputs(asked)
        streamer = TextIteratorStreamer(
            self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        stop = _Stop()
        ends = end_tokens(self.model, self.processor)
        failed: list[BaseException] = []
        options: dict[str, Any] = {"do_sample": False}
        if self.decoding.temperature > 0:
            options = {
                "do_sample": True,
                "temperature": self.decoding.temperature,
                "top_p": self.decoding.top_p,
            }

        def generate() -> None:
            try:
                with (
                    evaluation_mode(self.model),
                    stated_decoding(self.model),
                    torch.inference_mode(),
                ):
                    self.model.generate(
                        **inputs,
                        **options,
                        max_new_tokens=min(self.decoding.max_new_tokens, room),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([stop]),
                        pad_token_id=self.processor.tokenizer.pad_token_id,
                        eos_token_id=ends,
                    )
            except BaseException as error:  # handed over to the thread that reads
                failed.append(error)
                streamer.end()

        worker = threading.Thread(target=generate, daemon=True)
        worker.start()
        said = ""
        try:
            for piece in streamer:
                # White space at both ends is not part of the answer, as in evaluation.
                grown = (said + piece).lstrip() if not said.strip() else said + piece
                fresh = grown.rstrip()[len(said.rstrip()) :]
                said = grown
                if fresh:
                    yield fresh
        finally:
            stop.set()
            worker.join()
        if failed:
            raise failed[0]
        self.history.append((asked, said.strip()))

    def _inputs(self, question: str) -> tuple[dict[str, torch.Tensor], int]:
        """The model's inputs, and how many positions they leave for the answer."""
        prompt = self.processor.encode_prompt(
            question,
            history=self.history,
            num_images=0 if self.picture is None else 1,
            style=self.style,
        )
        inputs = self.processor.pad([prompt], side="left")
        room = room_for_answer(self.model, inputs)
        inputs = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        if self.picture is not None:
            pixels = self.processor.image_processor([self.picture], return_tensors="pt")
            inputs["pixel_values"] = pixels["pixel_values"].to(self.model.device, self.model.dtype)
        return inputs, room


def room_for_answer(model: CogVLMForCausalLM, inputs: Mapping[str, torch.Tensor]) -> int:
    """How many of the model's positions a prompt leaves.

    Args:
        model: For its number of positions.
        inputs: One row with `input_ids`, and `token_type_ids` where there are pictures.

    Raises:
        DataError: None; an answer would be nonsense.
    """
    types = inputs.get("token_type_ids")
    if types is None:
        types = torch.zeros_like(inputs["input_ids"])
    positions = int(build_position_ids(types).max()) + 1
    most = model.config.max_position_embeddings
    if positions + 1 > most:
        raise DataError(
            f"the conversation needs {positions:,} positions, the model has {most:,}; shorten the "
            "question, or begin anew"
        )
    return most - positions


class _Stop(StoppingCriteria):
    """Ends a generation from another thread."""

    def __init__(self) -> None:
        self._asked = threading.Event()

    def set(self) -> None:
        self._asked.set()

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        asked = self._asked.is_set()
        return torch.full((input_ids.shape[0],), asked, device=input_ids.device)


def open_chat(
    checkpoint: Path | str,
    *,
    style: str | None = None,
    decoding: Decoding | None = None,
    tokenizer: Path | str | None = None,
    dtype: str | None = None,
    quantize: Literal["nf4"] | None = None,
) -> Chat:
    """Loads a checkpoint to talk to, on the GPU where there is one.

    Args:
        checkpoint: Checkpoint or adapter folder.
        style: Prompt template; None takes the checkpoint's own.
        decoding: How answers are drawn; greedy, at most 256 tokens, where it is not given.
        tokenizer: Tokenizer folder, where the checkpoint holds none.
        dtype, quantize: As in `open_model`.

    Raises:
        CheckpointError: The folder is missing or is not a whole checkpoint.
    """
    processor = load_processor(checkpoint, tokenizer)  # a missing tokenizer is said at once
    model = open_model(checkpoint, dtype=dtype, quantize=quantize)
    return Chat(model, processor, style=style, decoding=decoding or Decoding())
