"""Talking to a checkpoint in a terminal, and asking it one question.

The loop keeps the conversation in the released template and sends it whole with each question.
Notable choices: a mistake inside the loop (a missing picture) is one line and the loop goes on; a
new picture begins a new conversation, because the model has seen one picture a conversation in its
alignment; nothing is read from the terminal but lines, so that the loop works in a pipe too.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from PIL import Image

from cogvlm_sft.checkpoint.load import load_model, load_processor
from cogvlm_sft.errors import CogVLMSFTError, DataError
from cogvlm_sft.evaluation.generate import Request, generate_answers, open_picture
from cogvlm_sft.model import CogVLMForCausalLM, CogVLMProcessor

HELP = "/image PATH shows a picture, /reset forgets the conversation, /quit ends; else: a question"


@dataclass(slots=True)
class Chat:
    """A conversation with a loaded model.

    Attributes:
        model, processor: Of one checkpoint.
        style: Prompt template; None takes the checkpoint's own.
        max_new_tokens: Longest answer.
        picture: What the conversation is about, or None.
        history: (question, answer) pairs so far.
    """

    model: CogVLMForCausalLM
    processor: CogVLMProcessor
    style: str | None = None
    max_new_tokens: int = 256
    picture: Image.Image | None = None
    history: list[tuple[str, str]] = field(default_factory=list)

    def show(self, path: Path | str) -> None:
        """Begins a new conversation about a picture.

        Raises:
            DataError: There is no such picture; the conversation goes on as it was.
        """
        self.picture = open_picture(path)
        self.history.clear()

    def reset(self) -> None:
        """Forgets the conversation and the picture."""
        self.picture = None
        self.history.clear()

    def say(self, question: str) -> str:
        """Asks, and remembers the round.

        Raises:
            DataError: The question is empty.
        """
        if not question.strip():
            raise DataError("the question is empty; expected some text")
        request = Request(
            images=() if self.picture is None else (self.picture,),
            question=question.strip(),
            style=self.style,
            history=tuple(self.history),
        )
        answer = generate_answers(
            self.model, self.processor, [request], max_new_tokens=self.max_new_tokens
        )[0]
        self.history.append((question.strip(), answer))
        return answer


def open_chat(
    checkpoint: Path | str,
    *,
    style: str | None = None,
    max_new_tokens: int = 256,
    dtype: str = "float32",
) -> Chat:
    """Loads a checkpoint to talk to.

    Raises:
        CheckpointError: The folder is missing or is not a whole checkpoint.
    """
    model = load_model(checkpoint, dtype=dtype)
    return Chat(model, load_processor(checkpoint), style=style, max_new_tokens=max_new_tokens)


def ask(
    checkpoint: Path | str,
    image: Path | str | None,
    question: str,
    *,
    style: str | None = None,
    max_new_tokens: int = 256,
) -> str:
    """One question, one answer.

    The picture is opened before the weights are loaded: a wrong path is said at once.

    Raises:
        DataError: The picture or the question is not usable.
        CheckpointError: The folder is missing or is not a whole checkpoint.
    """
    if not question.strip():
        raise DataError("the question is empty; expected some text")
    picture = None if image is None else open_picture(image)
    chat = open_chat(checkpoint, style=style, max_new_tokens=max_new_tokens)
    chat.picture = picture
    return chat.say(question)


def chat_loop(
    checkpoint: Path | str,
    *,
    image: Path | str | None = None,
    style: str | None = None,
    max_new_tokens: int = 256,
) -> None:
    """Talks until `/quit` or the end of the input.

    Raises:
        DataError: The first picture is not usable.
        CheckpointError: The folder is missing or is not a whole checkpoint.
    """
    picture = None if image is None else open_picture(image)
    chat = open_chat(checkpoint, style=style, max_new_tokens=max_new_tokens)
    chat.picture = picture
    run_loop(chat, sys.stdin, print, prompt="> " if sys.stdin.isatty() else "")


def run_loop(chat: Chat, lines: TextIO, write: Callable[[str], None], *, prompt: str = "") -> None:
    """The loop itself, over any lines.

    Args:
        chat: The conversation.
        lines: Where the user's lines come from.
        write: Gets each line of output.
        prompt: Shown before each line is read; empty in a pipe.
    """
    write(HELP)
    while True:
        if prompt:
            print(prompt, end="", flush=True)
        line = lines.readline()
        if not line:
            return
        text = line.strip()
        if not text:
            continue
        if text == "/quit":
            return
        try:
            write(_respond(chat, text))
        except CogVLMSFTError as error:
            write(f"error: {error}")


def _respond(chat: Chat, text: str) -> str:
    if not text.startswith("/"):
        return chat.say(text)
    command, _, rest = text.partition(" ")
    if command == "/image" and rest.strip():
        chat.show(rest.strip())
        return f"looking at {rest.strip()}; the conversation begins anew"
    if command == "/reset":
        chat.reset()
        return "forgotten"
    raise DataError(f"unknown command {text!r}; {HELP}")
