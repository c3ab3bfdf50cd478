"""Talking to a checkpoint in a terminal, and asking it one question.

Notable choices: answers are shown while they are made; a mistake inside the loop (a missing
picture) is one line and the loop goes on; Ctrl-C breaks off an answer, or ends the loop where none
is being given; nothing is read from the terminal but lines, so that the loop works in a pipe too.
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TextIO

from cogvlm_sft.chat.limits import check_question, read_upload
from cogvlm_sft.chat.session import Chat, Decoding, open_chat
from cogvlm_sft.errors import CogVLMSFTError, DataError
from cogvlm_sft.evaluation.drawing import PREDICTED, draw_boxes
from cogvlm_sft.evaluation.metrics.boxes import parse_boxes

HELP = (
    "/image PATH shows a picture, /draw PATH writes it with the last answer's boxes, "
    "/reset forgets the conversation, /help says this, /quit ends; else: a question"
)

Write = Callable[[str], None]


def ask(
    checkpoint: Path | str,
    image: Path | str | None,
    question: str,
    *,
    style: str | None = None,
    decoding: Decoding | None = None,
    tokenizer: Path | str | None = None,
    quantize: Literal["nf4"] | None = None,
    draw: Path | None = None,
) -> dict[str, Any]:
    """One question, one answer.

    Everything that can be wrong is looked at before the weights are loaded.

    Args:
        checkpoint: Checkpoint or adapter folder.
        image: A picture file, or None for a question about nothing but text.
        question: What is asked.
        style, decoding, tokenizer, quantize: As in `open_chat`.
        draw: Where to write the picture with the answer's boxes; nothing is written without boxes.

    Returns:
        image, question, answer, and boxes: lists of four whole thousandths of the picture's sides.

    Raises:
        DataError: The picture, the question or the file to draw is not usable.
        CheckpointError: The folder is missing or is not a whole checkpoint.
    """
    asked = check_question(question)
    picture = None if image is None else read_upload(Path(image))
    if draw is not None and picture is None:
        raise DataError("--draw needs a picture to draw on; give --image")
    chat = open_chat(
        checkpoint, style=style, decoding=decoding, tokenizer=tokenizer, quantize=quantize
    )
    chat.picture = picture
    record = _record(chat, asked, chat.say(asked), image)
    if draw is not None and record["boxes"]:
        draw_last_answer(chat, draw)
    return record


def chat_loop(
    checkpoint: Path | str,
    *,
    image: Path | str | None = None,
    style: str | None = None,
    decoding: Decoding | None = None,
    tokenizer: Path | str | None = None,
    quantize: Literal["nf4"] | None = None,
    as_json: bool = False,
) -> None:
    """Talks until `/quit` or the end of the input.

    Args:
        as_json: One JSON object for each answer in place of its text.

    Raises:
        DataError: The first picture is not usable.
        CheckpointError: The folder is missing or is not a whole checkpoint.
    """
    picture = None if image is None else read_upload(Path(image))
    chat = open_chat(
        checkpoint, style=style, decoding=decoding, tokenizer=tokenizer, quantize=quantize
    )
    chat.picture = picture
    prompt = "> " if sys.stdin.isatty() else ""
    run_loop(chat, sys.stdin, _print_now, prompt=prompt, as_json=as_json)


def run_loop(
    chat: Chat, lines: TextIO, write: Write, *, prompt: str = "", as_json: bool = False
) -> None:
    """The loop itself, over any lines.

    Args:
        chat: The conversation.
        lines: Where the user's lines come from.
        write: Gets the output in pieces, line ends included.
        prompt: Written before each line is read; empty in a pipe.
        as_json: One JSON object for each answer in place of its text.
    """
    if not as_json:
        write(HELP + "\n")
    while True:
        write(prompt)
        line = lines.readline()
        if not line:
            write("\n" if prompt else "")  # the shell's own prompt begins a line of its own
            return
        text = line.strip()
        if not text:
            continue
        if text == "/quit":
            return
        try:
            for piece in _respond(chat, text, as_json):
                write(piece)
            write("\n")
        except CogVLMSFTError as error:
            write(f"error: {error}\n")
        except KeyboardInterrupt:
            write("\n(broken off; this question is forgotten)\n")


def draw_last_answer(chat: Chat, path: Path) -> Path:
    """Writes the picture with the boxes of the last answer.

    Raises:
        DataError: There is no picture, no answer or no box, or the file cannot be written.
    """
    if chat.picture is None or not chat.history:
        raise DataError("there is nothing to draw yet; show a picture and ask where something is")
    boxes = parse_boxes(chat.history[-1][1])
    if not boxes:
        raise DataError(f"the last answer holds no box [[x0,y0,x1,y1]]: {chat.history[-1][1]!r}")
    try:
        draw_boxes(chat.picture, [(box, PREDICTED, "") for box in boxes]).save(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path}: cannot be written ({error}); give a path that ends in .png or .jpg"
        ) from None
    return path


def _respond(chat: Chat, text: str, as_json: bool) -> Iterator[str]:
    if not text.startswith("/"):
        if as_json:
            answer = chat.say(text)
            yield json.dumps(_record(chat, text, answer, None), ensure_ascii=False)
        else:
            yield from chat.answer(text)
            if parse_boxes(chat.history[-1][1]) and chat.picture is not None:
                yield "\n(boxes: /draw PATH writes the picture with them)"
        return
    command, _, rest = text.partition(" ")
    if command == "/image" and rest.strip():
        path = _typed_path(rest.strip())
        chat.show(path)
        yield f"looking at {path}; the conversation begins anew"
    elif command == "/draw" and rest.strip():
        yield f"written to {draw_last_answer(chat, _typed_path(rest.strip()))}"
    elif text == "/help":
        yield HELP
    elif command == "/reset":
        chat.reset()
        yield "forgotten"
    else:
        raise DataError(f"unknown command {text!r}; {HELP}")


def _typed_path(text: str) -> Path:
    """A path as people type it or drop it on a terminal: bare, quoted, or with escaped spaces.

    `~` is the home folder. A bare path may hold spaces and apostrophes.
    """
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    if len(words) == 1 and not Path(text).exists():
        text = words[0]
    return Path(text).expanduser()


def _record(chat: Chat, question: str, answer: str, image: Path | str | None) -> dict[str, Any]:
    boxes = parse_boxes(answer) if chat.picture is not None else []
    whole = [[int(side) for side in box] for box in boxes]
    record = {"question": question, "answer": answer, "boxes": whole}
    return {"image": str(image), **record} if image is not None else record


def _print_now(text: str) -> None:
    print(text, end="", flush=True)
