"""The page in a real browser: pictures and questions go in, answers and boxes come out.

The hostile part hands in what people and programs do: each is answered with one line, and the page
goes on working.
"""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from cogvlm_sft.chat.checkpoints import related_checkpoints
from cogvlm_sft.chat.session import Chat, Decoding
from cogvlm_sft.errors import CheckpointError, DataError

from .test_limits import huge_png

pytest.importorskip("gradio", reason="needs the extra `web`")

# Gradio's queue, in a thread of its own, uses options that pandas 3 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*downcasting")

_REAL_ANSWER = Chat.answer


def _answer(chat: Chat, question: str) -> Iterator[str]:
    """The real stream, but for questions that begin with "Where": random weights point nowhere."""
    if question.startswith("Slow"):
        for _ in range(600):
            time.sleep(0.1)
            yield "still "
    elif question.startswith("Where"):
        chat.history.append((question, "there [[100,200,500,900]]"))
        yield "there "
        yield "[[100,200,500,900]]"
    else:
        chat.decoding = Decoding(max_new_tokens=8)
        yield from _REAL_ANSWER(chat, question)


@pytest.fixture(scope="module")
def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: the checkpoint, and a recipe that names its base."""
    folder = tmp_path_factory.mktemp("run") / "chat"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "recipe.yaml").write_text(f"model:\n  checkpoint: {checkpoint}\n")
    return folder


@pytest.fixture(scope="module")
def url(run: Path) -> Iterator[str]:
    from cogvlm_sft.chat.web import open_page

    patch = pytest.MonkeyPatch()
    patch.setattr(Chat, "answer", _answer)
    blocks = open_page(run, port=0, block=False)
    yield blocks.local_url
    blocks.close()
    patch.undo()


def _open(page: Any, url: str) -> None:
    page.goto(url)
    page.wait_for_selector("#ask")


def _ask(page: Any, question: str, column: int = 0, end: str = "") -> str:
    """Asks, waits for the end of the answer (where it is known: for `end`), returns it."""
    bubbles = page.locator(f"#chat-{column} .bot.message, #chat-{column} .message.bot")
    before = bubbles.count()
    page.fill("#question textarea", question)
    page.click("#ask")
    page.wait_for_function(
        "([id, count]) => document.querySelectorAll(`${id} .message.bot`).length > count",
        arg=[f"#chat-{column}", before],
    )
    said = ""
    while not said or said != bubbles.last.inner_text() or not said.endswith(end):
        said = str(bubbles.last.inner_text())
        page.wait_for_timeout(500)
    return said


def _notice(page: Any) -> str:
    page.wait_for_selector("#notice", state="visible")
    return str(page.locator("#notice").inner_text())


@pytest.mark.slow
def test_a_picture_a_question_and_boxes(page: Any, url: str, picture: Path, tmp_path: Path) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    _open(page, url)
    page.set_input_files("#picture-file input[type=file]", str(picture))
    page.wait_for_selector("#preview img")
    assert _ask(page, "What digit is this?")
    assert not page.locator("#boxes-0 img").is_visible()
    assert "there" in _ask(page, "Where is it?", end="[[100,200,500,900]]")
    page.wait_for_selector("#boxes-0 img")
    assert page.locator("#chat-0 .message.user").count() == 2
    page.click("#chosen >> text=base")
    page.wait_for_selector("#chat-1", state="visible")
    assert _ask(page, "7?", column=1)
    assert page.locator("#chat-0 .message.user").count() == 3
    assert page.locator("#chat-1 .message.user").count() == 1
    page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.width == 1200
        assert len(shot.convert("RGB").getcolors(1 << 24) or []) > 50  # not a blank page
    page.click("#anew")
    page.wait_for_function("document.querySelectorAll('.message.user').length == 0")
    outside = [one for one in asked if not one.startswith((url, "data:", "blob:"))]
    assert not outside, "the page asked another machine"


@pytest.mark.slow
def test_what_begins_anew_breaks_off_the_answer(page: Any, url: str, picture: Path) -> None:
    _open(page, url)

    def upload() -> None:
        page.set_input_files("#picture-file input[type=file]", str(picture))
        page.wait_for_selector("#preview img")

    for change in (upload, lambda: page.click("#chosen >> text=base")):
        page.fill("#question textarea", "Slow?")
        page.click("#ask")
        page.wait_for_selector("#chat-0 >> text=still")
        change()
        page.wait_for_function("document.querySelectorAll('.message.user').length == 0")
        page.wait_for_timeout(1500)  # a stream that went on would write every tenth of a second
        assert page.locator(".message.user").count() == 0
    assert _ask(page, "What digit is this?")


def test_a_picture_that_is_no_longer_kept(run: Path, tmp_path: Path) -> None:
    from cogvlm_sft.chat.web import Shelf, answers

    with pytest.raises(DataError, match="no longer kept, 60 minutes after") as told:
        shown = tmp_path / "gone.png"
        list(answers(Shelf({"run": run}), ["run"], shown, "7?", "chat", Decoding(), {}))
    assert str(Path.cwd()) not in str(told.value)


@pytest.mark.slow
def test_hostile_input_is_refused_in_one_line_and_the_page_goes_on(
    page: Any, url: str, picture: Path, tmp_path: Path
) -> None:
    text = tmp_path / "cat.png"
    text.write_text("I am a cat")
    _open(page, url)
    file = "#picture-file input[type=file]"
    for path, message in (
        (huge_png(tmp_path / "huge.png"), "expected at most 50 million"),
        (text, "cat.png is not a picture"),
    ):
        page.set_input_files(file, str(path))
        page.wait_for_function(
            "text => (document.querySelector('#notice')?.innerText || '').includes(text)",
            arg=message,
        )
        page.wait_for_selector(file, state="attached")
    for question, message in (
        ("what <image> is it", "holds <image>"),
        ("<EOI>", "holds <EOI>"),
        ("<script>document.title = 'taken'</script> <image>", "holds <image>"),
        ("a" * 2**20, "expected at most 8,000"),
        ("   ", "the question is empty"),
    ):
        page.fill("#question textarea", question)
        page.click("#ask")
        page.wait_for_function(
            "text => (document.querySelector('#notice')?.innerText || '').includes(text)",
            arg=message,
        )
    assert "taken" not in page.title()
    page.set_input_files(file, str(picture))
    page.wait_for_selector("#preview img")
    assert _ask(page, "What digit is this?")
    page.wait_for_selector("#notice", state="hidden")
    assert "<b>bold</b>" in _said_by_user(page, "is <b>bold</b> 7?")


def _said_by_user(page: Any, question: str) -> str:
    _ask(page, question)
    return str(page.locator("#chat-0 .message.user").last.inner_text())


@pytest.mark.slow
def test_twenty_uploads_at_once_are_answered_and_memory_comes_back(
    run: Path, tmp_path: Path
) -> None:
    """On a page of its own, so that the memory is the page's and nothing else's."""
    from gradio_client import Client, handle_file

    Image.radial_gradient("L").resize((2400, 2400)).convert("RGB").save(tmp_path / "large.jpg")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cogvlm_sft.cli", "chat", str(run), "--web", "--port"]
    page = subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL)
    try:
        client = _client(Client, f"http://127.0.0.1:{port}/", page)

        def upload(_: int) -> Any:
            handed = handle_file(tmp_path / "large.jpg")
            return client.predict(handed, api_name="/on_upload")

        def megabytes() -> float:
            return float(psutil.Process(page.pid).memory_info().rss / 2**20)

        upload(0)
        before = megabytes()
        with ThreadPoolExecutor(20) as people:
            for _ in range(3):
                assert len(list(people.map(upload, range(20)))) == 20
        deadline = time.monotonic() + 60
        while (grown := megabytes() - before) > 60 and time.monotonic() < deadline:
            time.sleep(1)
        assert grown < 60, f"{grown:.0f} MB more after sixty pictures of 17 MB, decoded"
    finally:
        page.terminate()
        page.wait(60)


def _client(kind: Any, url: str, page: subprocess.Popen[bytes]) -> Any:
    """A client, once the page listens."""
    deadline = time.monotonic() + 180
    while True:
        assert page.poll() is None and time.monotonic() < deadline, "the page did not open"
        try:
            return kind(url, verbose=False)
        except httpx.HTTPError:
            time.sleep(0.5)


def test_it_listens_on_this_machine_alone_unless_told() -> None:
    from inspect import signature

    from cogvlm_sft.chat.serve import serve
    from cogvlm_sft.chat.web import open_page

    assert signature(open_page).parameters["host"].default == "127.0.0.1"
    assert signature(serve).parameters["host"].default == "127.0.0.1"


def test_checkpoints_of_a_run(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    (run / "snapshots/step-00000002").mkdir(parents=True)
    found = related_checkpoints(run, [checkpoint, tmp_path / "model"])
    assert list(found) == ["run", "base", "step 2", "model", "model (2)"]
    assert found["base"] == checkpoint
    for recipe in ("model: {checkpoint: gone}\n", "model: null\n", "model: [\n", "- a\n"):
        (run / "recipe.yaml").write_text(recipe)
        assert "base" not in related_checkpoints(run)


def test_a_wrong_folder_is_said_before_the_page_opens(tmp_path: Path) -> None:
    from cogvlm_sft.chat.web import build_page

    with pytest.raises(CheckpointError, match="does not exist"):
        build_page(tmp_path / "none")
