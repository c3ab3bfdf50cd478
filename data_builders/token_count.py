"""How long answers are: in tokens where a tokenizer is given, else in characters.

Read through `tokenizers` rather than `transformers`, so that a build loads no torch.
"""

from collections.abc import Callable
from pathlib import Path

from cogvlm_sft.errors import DataError

Count = Callable[[list[str]], tuple[str, list[int]]]


def counter_of(tokenizer: Path | None) -> Count:
    """A function from texts to the name of the unit and each text's length.

    Args:
        tokenizer: A `tokenizer.json`, or a folder that holds one; None counts characters.

    Raises:
        DataError: It is missing or cannot be read.
    """
    if tokenizer is None:
        return lambda texts: ("Characters", [len(text) for text in texts])
    file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    if not file.is_file():
        raise DataError(
            f"tokenizer {file}: no such file; expected a tokenizer.json, as `save_pretrained` "
            "writes it"
        )
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"tokenizer {file}: cannot be read ({error})") from None

    def count(texts: list[str]) -> tuple[str, list[int]]:
        encoded = loaded.encode_batch_fast(texts, add_special_tokens=False)
        return "Tokens", [len(one.ids) for one in encoded]

    return count
