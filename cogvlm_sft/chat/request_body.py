"""What a client of the server may ask for besides its messages.

transformers' server takes more than OpenAI's interface has (a generation configuration, a chat
template of the client's own), passes over what it cannot do (several choices, tools), and fails on
values that make no sense. Here every field is known and looked at. One that nothing here does is
let through only with a value that asks for nothing, since clients send those unasked.
"""

from typing import Any

from cogvlm_sft.errors import DataError

_COUNTS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# Lowest and highest value; the lowest of top_p is itself too low.
_NUMBERS = {"temperature": (0, 2), "top_p": (0, 1), "frequency_penalty": (0, 2)}
# Names of things, notes of the client, and what is looked at elsewhere.
_FREE = {
    "model", "messages", "input", "prompt", "instructions", "stream", "stream_options", "user",
    "metadata", "store", "service_tier", "safety_identifier", "include",
}  # fmt: skip
_TEXT = {"type": "text"}
_ASKS_FOR_NOTHING: tuple[Any, ...] = (
    False, 0, "", "none", "auto", "disabled", [], {}, _TEXT, ["text"], {"format": _TEXT},
)  # fmt: skip


def check_body(body: dict[str, Any]) -> None:
    """Looks at the fields of a request.

    Args:
        body: Of /v1/chat/completions, /v1/completions or /v1/responses.

    Raises:
        DataError: A value makes no sense, or asks for something that this server does not do.
    """
    for key, value in body.items():
        if value is None or key in _FREE:
            continue
        if key in _COUNTS:
            if type(value) is not int or value < 1:
                raise DataError(f"{key} is {value!r}, expected a whole number from 1")
        elif key == "seed":
            if type(value) is not int or not 0 <= value < 2**32:
                raise DataError(f"seed is {value!r}, expected a whole number from 0")
        elif key in _NUMBERS:
            low, high = _NUMBERS[key]
            fits = type(value) in (int, float) and low <= value <= high
            if not fits or (key == "top_p" and not value):
                above = "above " if key == "top_p" else ""
                raise DataError(f"{key} is {value!r}, expected {above}{low} to {high}")
        elif key == "n":
            if value != 1:
                raise DataError(f"n is {value!r}; one answer is given to a request")
        elif value not in _ASKS_FOR_NOTHING:
            raise DataError(f"{key!r} is not offered by this server; leave it out")
