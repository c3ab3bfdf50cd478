"""The chat as a page: a picture, questions, boxes drawn, and several checkpoints side by side.

The page is Gradio's; this file says what is on it and what happens. Notable choices: an upload is
measured before it is decoded (`limits.py`), so it comes in as a file and not through Gradio's own
picture component, which would decode it first; every refusal is one line that stays on the page;
models are loaded when they are first asked and only the chosen ones are kept; questions of several
visitors are answered in turn. Nothing leaves the machine: system fonts, no analytics, no sharing
link, and the page listens on this machine alone unless told otherwise.
"""

import gc
import html
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from cogvlm_sft.allocator import return_freed_memory
from cogvlm_sft.chat.checkpoints import RUN, related_checkpoints
from cogvlm_sft.chat.limits import MAX_CHARACTERS, MAX_FILE_BYTES, check_question, read_upload
from cogvlm_sft.chat.session import Chat, Decoding, open_chat
from cogvlm_sft.errors import CogVLMSFTError, DataError
from cogvlm_sft.evaluation.drawing import PREDICTED, draw_boxes, for_screen
from cogvlm_sft.evaluation.metrics.boxes import parse_boxes

COLUMNS = 3
_SIDE = 720
_WAITING = 64
_KEPT_SECONDS = 3600
_SILENT = "(it said nothing)"

History = list[tuple[str, str]]

_CSS = """
.gradio-container { max-width: 1320px !important; width: 100%; margin: 0 auto !important; }
footer { display: none !important; }
#notice { background: #fdecea; border-left: 4px solid #c0392b; border-radius: 4px;
          padding: .55rem .9rem; }
#notice, #notice * { color: #8a1f11; }
/* Gradio's bin would empty the column and leave the conversation in place; New does both. */
[id^=chat-] button[aria-label="Clear"] { display: none; }
#title h1 { margin: 0; font-size: 1.35rem; } #title p { margin: 0; opacity: .7; }
"""


class Shelf:
    """The checkpoints of a page: loaded when asked, the chosen ones kept.

    Args:
        checkpoints: Label and folder.
        tokenizer: Tokenizer folder, where the checkpoints hold none.
        quantize: As in `open_model`; for all of them.
    """

    def __init__(
        self,
        checkpoints: dict[str, Path],
        tokenizer: Path | None = None,
        quantize: Literal["nf4"] | None = None,
    ) -> None:
        self.checkpoints = checkpoints
        self._options: dict[str, Any] = {"tokenizer": tokenizer, "quantize": quantize}
        self._loaded: dict[str, Chat] = {}
        self._lock = threading.Lock()

    def take(self, label: str, chosen: Sequence[str]) -> Chat:
        """A checkpoint's model and processor; those that are not chosen are given back.

        Raises:
            CheckpointError: The folder is not a whole checkpoint.
        """
        with self._lock:
            for other in [name for name in self._loaded if name not in chosen]:
                del self._loaded[other]
                gc.collect()
            if label not in self._loaded:
                self._loaded[label] = open_chat(self.checkpoints[label], **self._options)
            return self._loaded[label]


def answers(
    shelf: Shelf,
    chosen: Sequence[str],
    picture: Path | None,
    question: str,
    style: str,
    decoding: Decoding,
    histories: dict[str, History],
) -> Iterator[tuple[str, str]]:
    """Asks the chosen checkpoints one after the other; (label, answer so far) while they write.

    Args:
        shelf: Where they are.
        chosen: Labels, at most `COLUMNS`.
        picture: File of the picture, or None.
        question: What was typed.
        style: Prompt template; without a picture Vicuna's `text` is used.
        decoding: How answers are drawn.
        histories: Earlier rounds by label; finished rounds are added.

    Raises:
        DataError: Nothing or too much is chosen, or `limits` refuses the question or the picture.
    """
    asked = check_question(question)
    if not chosen:
        raise DataError("no checkpoint is chosen; tick at least one under 'Side by side'")
    if len(chosen) > COLUMNS:
        raise DataError(f"{len(chosen)} checkpoints are chosen, expected at most {COLUMNS}")
    if picture is not None and not picture.is_file():
        raise DataError(
            f"the picture is no longer kept, {_KEPT_SECONDS // 60} minutes after it was handed in; "
            "drop it again"
        )
    shown = read_upload(picture) if picture is not None else None
    for label in chosen:
        loaded = shelf.take(label, chosen)
        chat = Chat(
            loaded.model,
            loaded.processor,
            style=style if shown is not None else "text",
            decoding=decoding,
            picture=shown,
            history=list(histories.get(label, [])),
        )
        said = ""
        for piece in chat.answer(asked):
            said += piece
            yield label, said
        yield label, said
        histories[label] = chat.history


def build_page(
    checkpoint: Path,
    *,
    compare: Sequence[Path] = (),
    tokenizer: Path | None = None,
    quantize: Literal["nf4"] | None = None,
) -> Any:
    """The page, not yet open.

    Args:
        checkpoint: A run's output folder, or any checkpoint or adapter folder.
        compare: Further checkpoints to choose from.
        tokenizer, quantize: As in `Shelf`.

    Returns:
        A `gradio.Blocks`.

    Raises:
        DataError: Gradio is missing.
        CheckpointError: `checkpoint` is not a whole checkpoint.
    """
    gr = _gradio()
    shelf = Shelf(related_checkpoints(checkpoint, compare), tokenizer, quantize)
    shelf.take(RUN, [RUN])  # a wrong folder is said before the page opens
    labels = list(shelf.checkpoints)

    with gr.Blocks(
        title=f"CogVLM: {checkpoint.name}", delete_cache=(600, _KEPT_SECONDS), fill_width=True
    ) as blocks:
        picture = gr.State(None)
        histories = gr.State({})
        # How often an answer was broken off. Changed in place, so that the one being written sees
        # it: Gradio's own way to cancel may come late, or be lost, on a busy machine.
        broken_off = gr.State([0])
        gr.Markdown(f"# CogVLM\n{checkpoint}", elem_id="title")
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                upload = gr.File(
                    label="Picture: drop it here",
                    file_types=["image"],
                    height=120,
                    elem_id="picture-file",
                )
                preview = gr.Image(
                    label="What the questions are about",
                    show_label=False,
                    interactive=False,
                    visible=False,
                    buttons=[],
                    elem_id="preview",
                )
                chosen = gr.CheckboxGroup(
                    labels,
                    value=[RUN],
                    label="Side by side",
                    info="what alignment changed",
                    visible=len(labels) > 1,
                    elem_id="chosen",
                )
                with gr.Accordion("How it answers", open=False, elem_id="decoding"):
                    style = gr.Radio(
                        [("dialogue", "chat"), ("short answer", "vqa"), ("bare text", "base")],
                        value="chat",
                        label="Prompt",
                        info="without a picture, Vicuna's prompt is used",
                        elem_id="style",
                    )
                    tokens = gr.Slider(1, 1024, value=256, step=1, label="Longest answer, tokens")
                    temperature = gr.Slider(
                        0, 2, value=0, step=0.05, label="Temperature", info="0 is greedy"
                    )
                    top_p = gr.Slider(0.05, 1, value=0.9, step=0.05, label="Top-p")
            with gr.Column(scale=5, min_width=480):
                notice = gr.HTML(visible=False, elem_id="notice")
                with gr.Row():
                    columns, chats, drawings = [], [], []
                    for number in range(COLUMNS):
                        with gr.Column(min_width=200, visible=number == 0) as column:
                            chats.append(
                                gr.Chatbot(
                                    label=RUN,
                                    height=440,
                                    render_markdown=False,
                                    buttons=[],
                                    placeholder="Show a picture and ask about it.",
                                    elem_id=f"chat-{number}",
                                )
                            )
                            drawings.append(
                                gr.Image(
                                    label="Where it points",
                                    show_label=False,
                                    interactive=False,
                                    visible=False,
                                    buttons=[],
                                    elem_id=f"boxes-{number}",
                                )
                            )
                        columns.append(column)
                with gr.Row():
                    question = gr.Textbox(
                        show_label=False,
                        placeholder="Ask something",
                        lines=1,
                        max_lines=6,
                        scale=8,
                        autofocus=True,
                        max_length=4 * MAX_CHARACTERS,
                        elem_id="question",
                    )
                    ask = gr.Button("Ask", variant="primary", scale=1, min_width=80, elem_id="ask")
                    stop = gr.Button("Stop", scale=1, min_width=80, elem_id="stop")
                    anew = gr.Button("New", scale=1, min_width=80, elem_id="anew")

        results = [*chats, *drawings]

        def fresh_columns() -> list[Any]:
            return [gr.Chatbot(value=[]) for _ in chats] + [_no_drawing(gr) for _ in drawings]

        def break_off(count: list[int]) -> None:
            count[0] += 1

        def on_upload(path: str | None, count: list[int]) -> list[Any]:
            break_off(count)
            try:
                shown = None if path is None else read_upload(Path(path))
            except CogVLMSFTError as error:
                return [
                    gr.HTML(_plain(error), visible=True), gr.File(value=None),
                    gr.Image(value=None, visible=False), None, {}, *fresh_columns(),
                ]  # fmt: skip
            small = None if shown is None else for_screen(shown, _SIDE)
            return [
                gr.HTML(visible=False), gr.skip(),
                gr.Image(value=small, visible=small is not None), path, {}, *fresh_columns(),
            ]  # fmt: skip

        def on_choice(labels_chosen: list[str], known: dict[str, History]) -> list[Any]:
            """Columns with the chosen checkpoints' conversations."""
            shown = labels_chosen[:COLUMNS] or [RUN]
            updates: list[Any] = []
            for number in range(COLUMNS):
                updates.append(gr.Column(visible=number < len(shown)))
            for number in range(COLUMNS):
                label = shown[number] if number < len(shown) else ""
                updates.append(gr.Chatbot(value=_messages(known.get(label, [])), label=label))
            return [*updates, *[_no_drawing(gr) for _ in drawings]]

        def on_ask(
            asked: str, path: str | None, labels_chosen: list[str], prompt: str, longest: int,
            heat: float, share: float, known: dict[str, History], count: list[int],
        ) -> Iterator[list[Any]]:  # fmt: skip
            begun = count[0]
            before = {label: _messages(known.get(label, [])) for label in labels_chosen}
            values: list[Any] = [gr.skip()] * (2 * COLUMNS)
            decoding = Decoding(int(longest), heat, share)
            source = Path(path) if path else None
            emptied: Any = ""
            try:
                stream = answers(shelf, labels_chosen, source, asked, prompt, decoding, known)
                for label, said in stream:
                    if count[0] != begun:
                        return
                    number = labels_chosen.index(label)
                    rounds = [*before[label], *_messages([(asked.strip(), said)])]
                    values[number] = gr.Chatbot(value=rounds)
                    values[COLUMNS + number] = _drawing(gr, source, said)
                    # The box is emptied once: the next question may be typed meanwhile.
                    yield [gr.HTML(visible=False), emptied, *values, known]
                    emptied = gr.skip()
            except CogVLMSFTError as error:
                # The question stays in its box, to be mended; one of a megabyte does not.
                kept = gr.skip() if len(asked) <= 4 * MAX_CHARACTERS else ""
                yield [gr.HTML(_plain(error), visible=True), kept, *values, known]

        def on_anew(count: list[int]) -> list[Any]:
            break_off(count)
            return [gr.HTML(visible=False), {}, *fresh_columns()]

        running = gr.on(
            [ask.click, question.submit],
            on_ask,
            [question, picture, chosen, style, tokens, temperature, top_p, histories, broken_off],
            [notice, question, *results, histories],
            concurrency_limit=1,
            show_progress="minimal",
        )
        # An answer that went on would write into columns that are no longer its own. It is broken
        # off beside the event itself, so its last piece may come after: what the conversations hold
        # is shown once more.
        uploaded = gr.on(
            [upload.upload, upload.clear],
            on_upload,
            [upload, broken_off],
            [notice, upload, preview, picture, histories, *results],
            show_progress="hidden",
            cancels=[running],
        )
        show = (on_choice, [chosen, histories], [*columns, *chats, *drawings])
        uploaded.then(*show, show_progress="hidden")
        ticked = chosen.change(
            break_off, broken_off, None, show_progress="hidden", cancels=[running]
        )
        ticked.then(*show, show_progress="hidden")
        emptied = anew.click(on_anew, broken_off, [notice, histories, *results], cancels=[running])
        emptied.then(*show, show_progress="hidden")
        stop.click(break_off, broken_off, None, show_progress="hidden", cancels=[running])
    return blocks.queue(max_size=_WAITING)


def open_page(
    checkpoint: Path,
    *,
    compare: Sequence[Path] = (),
    host: str = "127.0.0.1",
    port: int = 7860,
    tokenizer: Path | None = None,
    quantize: Literal["nf4"] | None = None,
    block: bool = True,
) -> Any:
    """Opens the page and, with `block`, serves it until Ctrl-C.

    Args:
        checkpoint, compare, tokenizer, quantize: As in `build_page`.
        host: Address to listen on; the default is this machine alone.
        port: Port to listen on; 0 takes a free one.
        block: Whether to wait; without, the page runs beside the caller.

    Returns:
        The `gradio.Blocks`; `close()` ends it.

    Raises:
        DataError: Gradio is missing, or the port is taken.
    """
    gr = _gradio()
    return_freed_memory()
    blocks = build_page(checkpoint, compare=compare, tokenizer=tokenizer, quantize=quantize)
    # Gradio's own fonts come from the network.
    theme = gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    try:
        blocks.launch(
            server_name=host,
            server_port=port or None,
            share=False,
            max_file_size=MAX_FILE_BYTES,
            theme=theme,
            css=_CSS,
            footer_links=[],
            prevent_thread_lock=not block,
            quiet=not block,
        )
    except OSError as error:
        raise DataError(f"the page cannot listen on {host}:{port}: {error}") from None
    return blocks


def _gradio() -> Any:
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio
    except ImportError:
        raise DataError("--web needs gradio: pip install 'cogvlm-sft[web]'") from None
    return gradio


def _plain(error: Exception) -> str:
    """A message as text of the page: it may repeat what was typed, or a file's name."""
    return html.escape(str(error))


def _messages(rounds: History) -> list[dict[str, str]]:
    """Rounds as Gradio's chat takes them; "<b>" that someone typed stays three characters."""
    messages = []
    for asked, answered in rounds:
        for role, text in (("user", asked), ("assistant", answered or _SILENT)):
            messages.append({"role": role, "content": html.escape(text, quote=False)})
    return messages


def _drawing(gr: Any, picture: Path | None, answer: str) -> Any:
    boxes = parse_boxes(answer)
    if picture is None or not boxes:
        return _no_drawing(gr)
    shown = for_screen(read_upload(picture), _SIDE)
    drawn = draw_boxes(shown, [(box, PREDICTED, "") for box in boxes])
    return gr.Image(value=drawn, visible=True)


def _no_drawing(gr: Any) -> Any:
    return gr.Image(value=None, visible=False)
