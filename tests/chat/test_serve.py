"""The server, asked by the official `openai` client over HTTP."""

import base64
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from cogvlm_sft.checkpoint.load import load_model, load_processor
from cogvlm_sft.evaluation.generate import Request, generate_answers

openai = pytest.importorskip("openai", reason="needs the extra `serve`")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra `serve`")


@pytest.fixture(scope="module")
def client(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from cogvlm_sft.chat.serve import build_app

    served = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(checkpoint, served)
    # As the released CogVLM2's, and worse: answers must be greedy all the same.
    (served / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 2.0, "repetition_penalty": 9.0, "max_length": 4096}'
    )
    config = uvicorn.Config(build_app(served), port=0, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as opened:
        yield opened.with_options(max_retries=0)
    server.should_exit = True
    thread.join(20)


def _asked(picture: Path | None, question: str) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": question}]
    if picture is not None:
        content = base64.b64encode(picture.read_bytes()).decode()
        url = f"data:image/png;base64,{content}"
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": parts}]


def test_a_question_about_a_picture(client: Any, checkpoint: Path, picture: Path) -> None:
    reply = client.chat.completions.create(
        model="cogvlm", messages=_asked(picture, "What digit is this?"), max_tokens=12
    )
    with Image.open(picture) as opened:
        request = Request((opened.convert("RGB"),), "What digit is this?")
    model, processor = load_model(checkpoint), load_processor(checkpoint)
    own = generate_answers(model, processor, [request], max_new_tokens=12)[0]
    assert reply.choices[0].message.content.strip() == own
    assert reply.usage.prompt_tokens > processor.num_image_tokens


def test_the_picture_changes_the_answer_and_a_stream_says_the_same(
    client: Any, picture: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.png"
    Image.effect_noise((30, 30), 80).convert("RGB").save(other)
    said = []
    for path in (picture, other):
        options = {"model": "cogvlm", "messages": _asked(path, "7"), "max_tokens": 16}
        whole = client.chat.completions.create(**options).choices[0].message.content
        pieces = client.chat.completions.create(**options, stream=True)
        assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == whole
        said.append(whole)
    assert said[0] != said[1]


def test_history_and_models(client: Any, picture: Path) -> None:
    messages = _asked(picture, "What digit is this?")
    messages += [{"role": "assistant", "content": "7"}, {"role": "user", "content": "Sure?"}]
    reply = client.chat.completions.create(model="cogvlm", messages=messages, max_tokens=4)
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert [model.id for model in client.models.list()] == ["cogvlm"]


def test_two_requests_at_once_get_their_own_answers(client: Any, picture: Path) -> None:
    def ask(question: str) -> str:
        reply = client.chat.completions.create(
            model="cogvlm", messages=_asked(picture, question), max_tokens=8
        )
        return str(reply.choices[0].message.content)

    asked = ["What digit is this?", "7", "Is it red?", "Why?"]
    alone = [ask(question) for question in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(ask, asked)) == alone


def test_another_model_and_a_picture_by_address_are_refused(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="pinned to 'cogvlm'; requested 'gpt-4o'"):
        client.chat.completions.create(model="gpt-4o", messages=_asked(None, "7?"), max_tokens=2)
    address = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/cat.png"}}
    with pytest.raises(openai.BadRequestError, match="opens no files and no addresses"):
        client.chat.completions.create(
            model="cogvlm", messages=[{"role": "user", "content": [address]}], max_tokens=2
        )


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "a <image> here"}], "holds <image>"),
        ([{"role": "system", "content": "be nice"}, {"role": "user", "content": "7"}], "'system'"),
        (
            [
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
                }
            ],
            "opens no files",
        ),
        ([{"role": "user", "content": "x" * 2**20}], "expected at most 8,000"),
        ([{"role": "user", "content": ["hello"]}], "a text or a list of parts"),
        ([{"role": "user", "content": 5}], "a text or a list of parts"),
        ([{"role": "user", "content": [{"type": "text"}]}], "holds no text"),
        (["hello"], "a list of objects"),
        (
            [
                {"role": "user", "content": "7?"},
                {"role": "assistant", "content": "an <image>"},
                {"role": "user", "content": "7?"},
            ],
            "assistant message holds <image>",
        ),
    ],
)
def test_refusals_are_said_and_the_server_goes_on(
    client: Any, messages: list[Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(model="cogvlm", messages=messages, max_tokens=2)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="gpt2", messages=[], max_tokens=2)
    reply = client.chat.completions.create(
        model="cogvlm", messages=_asked(None, "7?"), max_tokens=2
    )
    assert reply.choices


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, expected a whole number from 1"),
        ({"max_completion_tokens": "x"}, "max_completion_tokens is 'x'"),
        ({"temperature": -1}, "temperature is -1, expected 0 to 2"),
        ({"top_p": 0}, "top_p is 0, expected above 0 to 1"),
        ({"seed": -1}, "seed is -1"),
        ({"n": 2}, "n is 2; one answer"),
        ({"stop": ["."]}, "'stop' is not offered"),
        ({"logprobs": True}, "'logprobs' is not offered"),
        ({"tools": [{"type": "function"}]}, "'tools' is not offered"),
        ({"response_format": {"type": "json_object"}}, "'response_format' is not offered"),
        ({"generation_config": "{"}, "'generation_config' is not offered"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "'chat_template_kwargs' is not"),
    ],
)
def test_fields_are_looked_at(client: Any, field: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        client.chat.completions.create(
            model="cogvlm", messages=_asked(None, "7?"), extra_body={"max_tokens": 2, **field}
        )
    neutral = {
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0,
        "response_format": {"type": "text"},
    }
    assert client.chat.completions.create(
        model="cogvlm", messages=_asked(None, "7?"), max_tokens=2, **neutral
    ).choices


def test_only_what_a_cogvlm_does_is_served(client: Any) -> None:
    server = str(client.base_url).removesuffix("/v1/")
    for path in ("/load_model", "/reset", "/v1/audio/transcriptions", "/docs", "/openapi.json"):
        assert httpx.post(server + path, json={"model": "gpt2"}).status_code == 404
    assert httpx.get(f"{server}/health").json() == {"status": "ok"}


def test_a_prompt_without_room_is_refused_and_an_answer_ends_in_time(client: Any) -> None:
    long = [{"role": "user", "content": "What digit is this? " * 60}]
    with pytest.raises(openai.BadRequestError, match="positions, the model has 256"):
        client.chat.completions.create(model="cogvlm", messages=long)
    with pytest.raises(openai.BadRequestError, match="positions, the model has 256"):
        client.completions.create(model="cogvlm", prompt="What digit is this? " * 60)
    with pytest.raises(openai.BadRequestError, match="positions, the model has 256"):
        client.chat.completions.create(model="cogvlm", messages=long, stream=True)
    reply = client.chat.completions.create(
        model="cogvlm", messages=_asked(None, "7?"), max_tokens=10**9
    )
    assert reply.usage.total_tokens <= 256


def test_responses_come_whole_unless_streams_are_asked_for(client: Any) -> None:
    reply = client.responses.create(model="cogvlm", input="What digit is this?")
    events = client.responses.create(model="cogvlm", input="What digit is this?", stream=True)
    streamed = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(streamed) == reply.output_text
    with pytest.raises(openai.BadRequestError, match="no messages"):
        client.chat.completions.create(model="cogvlm", messages=[])


def test_a_body_without_messages_or_without_bounds_is_refused(client: Any) -> None:
    address = f"{client.base_url}chat/completions"
    reply = httpx.post(address, json={"model": "cogvlm"}, timeout=60)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"] == "the request holds no messages"
    # Refused by its header: of the body nothing is sent.
    server = (client.base_url.host, client.base_url.port)
    for header, status in ((f"Content-Length: {2**30}", 413), ("Transfer-Encoding: chunked", 411)):
        with socket.create_connection(server, timeout=60) as line:
            head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            line.sendall(f"{head}Content-Type: application/json\r\n{header}\r\n\r\n".encode())
            assert line.recv(64).startswith(f"HTTP/1.1 {status} ".encode())
