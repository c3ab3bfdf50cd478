"""The one-shot question, the loop, and the stream, on a tiny checkpoint with random weights."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cogvlm_sft.chat import session
from cogvlm_sft.chat.session import Chat, Decoding, open_chat
from cogvlm_sft.chat.terminal import ask, draw_last_answer, run_loop
from cogvlm_sft.cli import main
from cogvlm_sft.errors import CheckpointError, DataError
from cogvlm_sft.evaluation.generate import Request, generate_answers

SHORT = Decoding(max_new_tokens=4)


def _loop(chat: Chat, *lines: str, as_json: bool = False) -> list[str]:
    said: list[str] = []
    run_loop(chat, io.StringIO("\n".join(lines) + "\n"), said.append, as_json=as_json)
    return "".join(said).splitlines()


def test_the_stream_says_what_evaluation_generates(checkpoint: Path, picture: Path) -> None:
    chat = open_chat(checkpoint, decoding=Decoding(max_new_tokens=24))
    chat.show(picture)
    history: tuple[tuple[str, str], ...] = ()
    with Image.open(picture) as opened:
        shown = opened.convert("RGB")
    longest = 0
    for question in ("What digit is this?", "7?", "Why?"):
        pieces = list(chat.answer(question))
        request = Request((shown,), question, None, history)
        whole = generate_answers(chat.model, chat.processor, [request], max_new_tokens=24)[0]
        assert "".join(pieces) == whole
        history = (*history, (question, whole))
        longest = max(longest, len(pieces))
    assert chat.history == list(history)
    assert longest > 1, "the answers came in one piece each; they were not streamed"


def test_closing_the_stream_stops_the_model_and_forgets_the_question(checkpoint: Path) -> None:
    chat = open_chat(checkpoint, decoding=Decoding(max_new_tokens=200))
    stream = chat.answer("What digit is this?")
    next(stream)
    stream.close()
    assert chat.history == []
    assert isinstance(chat.say("7?"), str)


def test_an_error_of_the_model_reaches_the_reader(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = open_chat(checkpoint)

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(chat.model, "generate", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        chat.say("7?")


def test_sampling_follows_the_seed_and_differs_from_greedy(checkpoint: Path) -> None:
    import torch

    said = []
    for seed in (1, 1, 2, 3):
        chat = open_chat(checkpoint, decoding=Decoding(16, temperature=3.0, top_p=1.0))
        torch.manual_seed(seed)
        said.append(chat.say("What digit is this?"))
    assert said[0] == said[1]
    assert len(set(said)) > 1


def test_one_question_one_answer(checkpoint: Path, picture: Path) -> None:
    record = ask(checkpoint, picture, "What digit is this?", decoding=SHORT)
    assert record["question"] == "What digit is this?"
    assert record == ask(checkpoint, picture, "What digit is this?", decoding=SHORT)


def test_boxes_of_an_answer_are_returned_and_drawn(
    checkpoint: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session.Chat, "answer", _boxed)
    record = ask(checkpoint, picture, "Where?", draw=tmp_path / "drawn.png")
    assert json.dumps(record["boxes"]) == "[[100, 200, 500, 900]]"
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert drawn.size == (40, 30)
        assert len(drawn.getcolors() or []) > 1
    chat = open_chat(checkpoint)
    with pytest.raises(DataError, match="nothing to draw yet"):
        draw_last_answer(chat, tmp_path / "no.png")
    chat.show(picture)
    chat.say("Where?")
    with pytest.raises(DataError, match=r"ends in \.png"):
        draw_last_answer(chat, tmp_path / "no.txt")


def _boxed(chat: Chat, question: str) -> list[str]:
    chat.history.append((question, "there [[100,200,500,900]]"))
    return ["there [[100,200,500,900]]"]


def test_mistakes_are_clear(checkpoint: Path, picture: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png does not exist"):
        ask(checkpoint, tmp_path / "none.png", "What?")
    with pytest.raises(CheckpointError, match="does not exist"):
        ask(tmp_path / "none", picture, "What?")
    with pytest.raises(DataError, match="question is empty"):
        ask(checkpoint, picture, "  ")
    with pytest.raises(DataError, match="--draw needs a picture"):
        ask(checkpoint, None, "What?", draw=tmp_path / "x.png")
    with pytest.raises(DataError, match="the model has 256"):
        ask(checkpoint, picture, "digit " * 400)


def test_the_loop_keeps_history_and_survives_mistakes(checkpoint: Path, picture: Path) -> None:
    chat = open_chat(checkpoint, decoding=SHORT)
    said = _loop(chat, "/image nowhere.png", f"/image {picture}", "What digit is this?", "", "7?",
                 "<image> now", "/what", "/quit", "never reached")  # fmt: skip
    assert "nowhere.png does not exist" in said[1]
    assert said[2].startswith("looking at")
    assert [question for question, _ in chat.history] == ["What digit is this?", "7?"]
    assert "holds <image>" in said[-2]
    assert "unknown command '/what'" in said[-1]


@pytest.mark.parametrize("typed", ["{}", "'{}'", '"{}"', "ESCAPED", "HOME"])
def test_paths_as_people_type_or_drop_them(
    typed: str, checkpoint: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = picture.parent / "my pictures"
    folder.mkdir()
    path = picture.rename(folder / "a red one.png")
    monkeypatch.setenv("HOME", str(folder))
    forms = {"ESCAPED": str(path).replace(" ", "\\ "), "HOME": "~/a\\ red\\ one.png"}
    chat = open_chat(checkpoint, decoding=SHORT)
    said = _loop(chat, f"/image {forms.get(typed, typed.format(path))}")
    assert said[1] == f"looking at {path}; the conversation begins anew"


def test_a_bare_path_may_hold_an_apostrophe(checkpoint: Path, picture: Path) -> None:
    path = picture.rename(picture.parent / "bob's one.png")
    chat = open_chat(checkpoint, decoding=SHORT)
    assert _loop(chat, f"/image {path}")[1].startswith("looking at")


def test_the_loop_in_json(checkpoint: Path) -> None:
    chat = open_chat(checkpoint, decoding=SHORT)
    said = _loop(chat, "What digit is this?", "7?", as_json=True)
    assert [json.loads(line)["question"] for line in said] == ["What digit is this?", "7?"]


def test_help_lists_the_commands(checkpoint: Path) -> None:
    said = _loop(open_chat(checkpoint, decoding=SHORT), "/help")
    assert "/image PATH" in said[1] and "error" not in said[1]


def test_history_changes_the_prompt(checkpoint: Path, picture: Path) -> None:
    chat = open_chat(checkpoint, decoding=SHORT)
    chat.show(picture)
    seen: list[int] = []
    encode = chat.processor.encode_prompt

    def spy(question: str, **keywords: object) -> dict[str, list[int]]:
        prompt: dict[str, list[int]] = encode(question, **keywords)  # type: ignore[arg-type]
        seen.append(len(prompt["input_ids"]))
        return prompt

    chat.processor.encode_prompt = spy  # type: ignore[method-assign]
    chat.say("7?")
    chat.say("7?")
    chat.reset()
    assert chat.picture is None and chat.history == []
    assert seen[1] > seen[0]


def test_the_command_prints_an_answer_or_a_json_object(
    checkpoint: Path, picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["chat", str(checkpoint), "--image", str(picture), "--question", "7?"]
    assert main([*asked, "--max-new-tokens", "3"]) == 0
    plain = capsys.readouterr().out.rstrip("\n")
    assert main([*asked, "--max-new-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == plain
    assert main(["chat", str(checkpoint), "--question", "<EOI>"]) == 2
    assert "holds <EOI>" in capsys.readouterr().err
