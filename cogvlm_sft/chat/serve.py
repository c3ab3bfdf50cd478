"""transformers' own OpenAI-compatible server with a CogVLM in it.

`transformers serve` finds classes in its own name space only, so the bare command cannot load a
CogVLM. Here its server is put together in this process around our loader (which reads adapters
too), and the class is entered in the table that tells the server which models see pictures.
Notable choices: a picture comes as bytes in a `data:` address and under the limits of the page;
the server opens no file and no address that a client names (the stock one would do both), and no
client hands in a chat template. A temperature above 0 samples, as clients expect, and a prompt that
does not fit the model's positions is refused as in the chat. Requests are answered one after the
other.
"""

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, Literal

from cogvlm_sft.allocator import return_freed_memory
from cogvlm_sft.chat.limits import MAX_FILE_BYTES, check_question, read_data_url, refuse_markers
from cogvlm_sft.chat.request_body import check_body
from cogvlm_sft.chat.session import open_chat, room_for_answer
from cogvlm_sft.errors import CogVLMSFTError, DataError
from cogvlm_sft.evaluation.generate import end_tokens

# One picture in base64 and its conversation; a longer body is not read at all.
_MAX_BODY_BYTES = MAX_FILE_BYTES * 4 // 3 + 2**20
_PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
_INSTALL = "pip install 'cogvlm-sft[serve]'"


def build_app(
    checkpoint: Path,
    *,
    name: str = "cogvlm",
    tokenizer: Path | None = None,
    quantize: Literal["nf4"] | None = None,
) -> Any:
    """The server's application, its model loaded.

    Args:
        checkpoint: Checkpoint or adapter folder.
        name: What clients call the model.
        tokenizer: Tokenizer folder, where the checkpoint holds none.
        quantize: As in `open_model`.

    Returns:
        A FastAPI application with /v1/chat/completions, /v1/completions, /v1/responses,
        /v1/models and /health.

    Raises:
        DataError: The server's packages are missing.
        CheckpointError: The folder is missing or is not a whole checkpoint.
    """
    try:
        import fastapi
        import openai  # noqa: F401 - transformers' server needs its types
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise DataError(f"--serve needs {error.name}: {_INSTALL}") from None
    from transformers import GenerationConfig
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["cogvlm"] = "CogVLMForCausalLM"
    chat = open_chat(checkpoint, tokenizer=tokenizer, quantize=quantize)

    # Greedy unless a client asks otherwise, whatever generation_config.json says.
    chat.model.generation_config = GenerationConfig(
        eos_token_id=end_tokens(chat.model, chat.processor),
        pad_token_id=chat.processor.tokenizer.pad_token_id,
    )
    generate = chat.model.generate

    def generate_in_bounds(**inputs: Any) -> Any:
        config = inputs["generation_config"]
        config.max_new_tokens = min(config.max_new_tokens, room_for_answer(chat.model, inputs))
        return generate(**inputs)

    chat.model.generate = generate_in_bounds

    class Manager(ModelManager):
        """Knows one model, and loads nothing that a client names."""

        def _load_processor(self, model_id_and_revision: str, **_: Any) -> Any:
            return chat.processor

        def _load_model(self, model_id_and_revision: str, **_: Any) -> Any:
            return chat.model

        def load_model_and_processor(
            self, model_id_and_revision: str, *arguments: Any, **options: Any
        ) -> Any:
            wanted = model_id_and_revision.removesuffix("@main")
            if wanted != name:
                raise fastapi.HTTPException(404, f"no model {wanted!r}; this server has {name!r}")
            return super().load_model_and_processor(model_id_and_revision, *arguments, **options)

        def get_gen_models(self) -> list[dict[str, Any]]:
            return [{"id": name, "object": "model", "created": 0, "owned_by": "cogvlm-sft"}]

        def shutdown(self) -> None:
            """Keeps the model: /reset is a client's call."""

    class Pictures:
        """Reads messages under our limits, and samples where a temperature is given."""

        @staticmethod
        def get_processor_inputs_from_messages(
            messages: list[dict[str, Any]], modality: Any
        ) -> list[dict[str, Any]]:
            return read_messages(messages)

        def _build_generation_config(self, body: dict[str, Any], *rest: Any, **options: Any) -> Any:
            config = super()._build_generation_config(body, *rest, **options)  # type: ignore[misc]
            if (body.get("temperature") or 0) > 0:
                config.do_sample = True
            return config

    class Bounded:
        """Refuses before a stream begins: what is said inside of one is lost on OpenAI's client."""

        def _streaming(self, *arguments: Any, **options: Any) -> Any:
            for inputs in arguments:
                if isinstance(inputs, Mapping) and "input_ids" in inputs:
                    room_for_answer(chat.model, inputs)
            return super()._streaming(*arguments, **options)  # type: ignore[misc]

    class Chats(Pictures, Bounded, ChatCompletionHandler):
        async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
            check_body(body)
            if not body.get("messages"):
                raise DataError("the request holds no messages")
            return await super().handle_request(body, request_id)

    class Responses(Pictures, Bounded, ResponseHandler):
        async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
            check_body(body)
            # As OpenAI's own: the stock one streams to clients that did not ask for it.
            return await super().handle_request({"stream": False, **body}, request_id)

    class Completions(Bounded, CompletionHandler):
        async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
            check_body(body)
            return await super().handle_request(body, request_id)

    manager = Manager(force_model=name, device=str(chat.model.device))
    state = GenerationState()
    app = build_server(
        manager,
        Chats(manager, state),
        completion_handler=Completions(manager, state),
        response_handler=Responses(manager, state),
        generation_state=state,
        # Of routes that are taken away below; which there are depends on transformers' version.
        **{
            name: None
            for name in signature(build_server).parameters
            if name in ("transcription_handler", "systemone_handler")
        },
    )

    # What a CogVLM does not do, other models, and a page whose scripts come from the network.
    app.router.routes[:] = [
        route for route in app.router.routes if getattr(route, "path", "") in _PATHS
    ]

    # A refusal in OpenAI's form: their client shows no message in another one.
    def refusal(message: str, status: int) -> Any:
        error = {"message": message, "type": "invalid_request_error"}
        return fastapi.responses.JSONResponse({"error": error}, status_code=status)

    @app.middleware("http")
    async def _measure(request: Any, go_on: Any) -> Any:
        if "transfer-encoding" in request.headers:
            return refusal("a request must say its length (Content-Length)", 411)
        if int(request.headers.get("content-length", 0)) > _MAX_BODY_BYTES:
            most = _MAX_BODY_BYTES // 2**20
            return refusal(f"the request has more than {most} MB; send a smaller picture", 413)
        return await go_on(request)

    @app.exception_handler(CogVLMSFTError)
    async def _refuse(_: Any, error: CogVLMSFTError) -> Any:
        return refusal(str(error), 400)

    @app.exception_handler(fastapi.HTTPException)
    async def _refuse_stock(_: Any, error: Any) -> Any:
        return refusal(str(error.detail), error.status_code)

    return app


def serve(
    checkpoint: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    tokenizer: Path | None = None,
    quantize: Literal["nf4"] | None = None,
) -> None:
    """Serves until Ctrl-C; as `build_app`."""
    return_freed_memory()
    app = build_app(checkpoint, tokenizer=tokenizer, quantize=quantize)
    import uvicorn

    print(f"OpenAI-compatible server: http://{host}:{port}/v1, model 'cogvlm' (Ctrl-C ends it)")
    uvicorn.run(app, host=host, port=port, log_level="warning")


def read_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages of a client in the processor's form.

    Args:
        messages: What came where OpenAI's interface has a list of role and content.

    Raises:
        DataError: A message is of another shape, a part is neither text nor picture, or `limits`
            refuses it.
    """
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise DataError("messages must be a list of objects with role and content")
    return [_message(message) for message in messages]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    role, content = str(message.get("role")), message.get("content")
    if content is None or isinstance(content, str):
        content = [{"type": "text", "text": content or ""}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise DataError(f"the content of a {role} message must be a text or a list of parts")
    return {"role": role, "content": [_part(part, role) for part in content]}


def _part(part: dict[str, Any], role: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind in ("text", "input_text", "output_text"):
        text = part.get("text")
        if not isinstance(text, str):
            raise DataError(f"a text part of a {role} message holds no text")
        if role == "user":
            return {"type": "text", "text": check_question(text)}
        refuse_markers(text, f"a {role} message")
        return {"type": "text", "text": text}
    if kind in ("image_url", "input_image"):
        url = part.get("image_url")
        url = url.get("url") if isinstance(url, dict) else url
        return {"type": "image", "image": read_data_url(str(url or ""))}
    raise DataError(f"a message holds a part of type {kind!r}; expected text or image_url")
