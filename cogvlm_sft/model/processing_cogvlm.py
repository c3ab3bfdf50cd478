"""Text and pictures to the model's inputs: one code path for training, inference and stock TRL.

Rows are encoded by `encoding_cogvlm.py`; here they become batches, by transformers' processor
interface. Notable choices: `token_type_ids` come from where pictures were put, never from
`ids == pad`, because pad is EOS in some tokenizers; offsets refer to the text as it was given, so
transformers' assistant masks are right without knowing about pictures.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jinja2.exceptions import TemplateError
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from cogvlm_sft.errors import ModelInputError

from .encoded_text import EncodedText
from .encoding_cogvlm import CogVLMEncodingMixin, count_message
from .image_processing_cogvlm import CogVLMImageProcessor
from .prompts import (
    CHAT_TEMPLATE,
    IMAGE_MARKER,
    check_style,
)
from .token_layout import IGNORE_INDEX


class CogVLMProcessor(CogVLMEncodingMixin, ProcessorMixin):
    """Joins CogVLM's image transform and a tokenizer.

    Args:
        image_processor: The transform; it knows how many tokens a picture takes.
        tokenizer: A fast tokenizer with BOS and EOS. Without a pad token it gets `<unk>`, as in
            Vicuna, or EOS where there is no `<unk>`.
        style: Prompt for rows with a picture: chat, vqa, base or text. Rows without one get `text`
            unless the call says otherwise.
        chat_template: Jinja template in place of ours.

    Raises:
        ModelInputError: The tokenizer lacks BOS or EOS or has no offsets; an unknown style.
    """

    def __init__(
        self,
        image_processor: CogVLMImageProcessor,
        tokenizer: Any,
        style: str = "chat",
        chat_template: str | None = None,
    ) -> None:
        check_style(style)
        for name, token in (("BOS", tokenizer.bos_token), ("EOS", tokenizer.eos_token)):
            if token is None:
                raise ModelInputError(
                    f"the tokenizer ({type(tokenizer).__name__}, {len(tokenizer)} entries) has no "
                    f"{name} token; CogVLM needs one, set tokenizer.{name.lower()}_token to an "
                    "entry of its vocabulary"
                )
        if not tokenizer.is_fast:
            raise ModelInputError(
                f"{type(tokenizer).__name__} gives no offsets; expected a fast tokenizer, load it "
                "with AutoTokenizer.from_pretrained(folder)"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE)
        self.style = style
        first = tokenizer.tokenize("a", add_special_tokens=False)[0]
        # LLaMA's kind writes a word-initial space itself. Byte-level BPE does not, and the answer
        # must carry it, or training would see "Answer:red" where inference continues "Answer: red".
        # The official CogVLM2 code encodes the answer without one; there we depart from it.
        self._answer_prefix = "" if first.startswith(("\u2581", "\u0120")) else " "

    @property
    def model_input_names(self) -> list[str]:
        """The keys that `__call__` returns."""
        return ["input_ids", "attention_mask", "token_type_ids", "pixel_values"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        *,
        style: str | None = None,
        padding: bool | str | None = None,
        padding_side: Literal["left", "right"] = "left",
        pad_to_multiple_of: int | None = None,
        truncation: bool | None = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        return_tensors: str | None = None,
        return_offsets_mapping: bool = False,
        return_text_replacement_offsets: bool = False,
        answer_starts: Sequence[int | None] | None = None,
    ) -> BatchFeature:
        """Rows of text and their pictures to model inputs.

        Args:
            images: One picture, a list (dealt out by the rows' markers), or a list for each row.
            text: One text or several. Without `style` it is taken as it is: BOS and EOS written in
                it are those tokens, pictures stand where their `<image>` does. A text that starts
                without BOS under `add_special_tokens=False` continues another one.
            style: Take `text` as a question, and make the prompt of this style.
            padding: True or "longest", "max_length", or False; None pads when tensors are asked.
            padding_side: Left by default, which is what `generate` needs.
            truncation: Cut rows at `max_length`; never inside a picture.
            answer_starts: For each row, where the last answer begins (it is encoded on its own).
            return_offsets_mapping: Adds `offset_mapping`, in characters of `text` as given.
            return_text_replacement_offsets: Accepted for transformers; offsets need no shift.

        Returns:
            input_ids, attention_mask and token_type_ids (rows, length), and with pictures
            pixel_values (pictures, 3, S, S) in the order of their markers.

        Raises:
            ModelInputError: Markers and images differ; two pictures with nothing between; a cut
                would fall inside a picture; video or audio was given.
        """
        if videos is not None or audio is not None or text is None:
            raise ModelInputError("CogVLM takes text, with or without images; no video, no audio")
        texts = [text] if isinstance(text, str) else list(text)
        pictures = _deal_pictures(images, texts, lenient=style is not None)
        rows = []
        for index, (words, mine) in enumerate(zip(texts, pictures, strict=True)):
            where = f"row {index}: " if len(texts) > 1 else ""
            if style is not None:
                row = self.encode_rounds(words, num_images=len(mine), style=style)
            else:
                if words.count(IMAGE_MARKER) != len(mine):
                    raise ModelInputError(
                        where + count_message(words.count(IMAGE_MARKER), len(mine))
                    )
                start = answer_starts[index] if answer_starts is not None else None
                row = self.encode_rendered(words, start, add_special_tokens)
            if truncation and max_length is not None:
                row.truncate(max_length, where)
            rows.append(row)
        data = self._columns(
            rows,
            side=padding_side,
            length=_padded_length(
                rows, padding, max_length, pad_to_multiple_of, bool(return_tensors)
            ),
        )
        if not return_offsets_mapping:
            del data["offset_mapping"]
        flat = [picture for mine in pictures for picture in mine]
        if flat:
            data.update(self.image_processor(flat))
        return BatchFeature(
            data, tensor_type=return_tensors, skip_tensor_conversion=["offset_mapping"]
        )

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, **kwargs: Any
    ) -> Any:
        """Messages to text, or with `tokenize=True` to model inputs; as in transformers.

        Takes `style` besides. The last answer is found here, because it is encoded on its own.

        Raises:
            ModelInputError: A system message or an unknown style, and as `__call__`.
        """
        own = self.chat_template
        named = own if isinstance(own, dict) else {"default": own}
        if "default_style" in (named.get(chat_template or "default", chat_template) or ""):
            kwargs.setdefault("default_style", self.style)
        try:
            if kwargs.get("tokenize") and not kwargs.get("add_generation_prompt"):
                starts = self._answer_starts(conversation, chat_template, kwargs)
                given = kwargs.get("processor_kwargs") or {}
                kwargs["processor_kwargs"] = {**given, "answer_starts": starts}
            return super().apply_chat_template(conversation, chat_template=chat_template, **kwargs)
        except TemplateError as error:
            raise ModelInputError(str(error)) from error

    def pad(
        self, rows: Sequence[dict[str, Any]], side: Literal["left", "right"] = "left"
    ) -> dict[str, torch.Tensor]:
        """Rows of different length to tensors.

        Args:
            rows: Each with input_ids and token_type_ids, and labels or not.
            side: Left for generation, right for training.

        Returns:
            input_ids, attention_mask, token_type_ids (and labels), each (rows, longest), int64.
        """
        length = max(len(row["input_ids"]) for row in rows)
        fills = {"input_ids": self.tokenizer.pad_token_id, "token_type_ids": 0}
        if "labels" in rows[0]:
            fills["labels"] = IGNORE_INDEX
        padded = {
            name: torch.tensor([_fill(list(row[name]), fill, length, side) for row in rows])
            for name, fill in fills.items()
        }
        ones = [_fill([1] * len(row["input_ids"]), 0, length, side) for row in rows]
        return {**padded, "attention_mask": torch.tensor(ones)}

    def _answer_starts(
        self, conversation: Any, chat_template: str | None, kwargs: dict[str, Any]
    ) -> list[int | None]:
        """Where the last answer of each conversation begins in its rendered text."""
        several = bool(conversation) and isinstance(conversation[0], list | tuple)
        rendering = {
            name: value
            for name, value in kwargs.items()
            if name not in _TOKENIZING and name != "continue_final_message"
        }
        starts: list[int | None] = []
        for messages in conversation if several else [conversation]:
            answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            start = None
            if answers and answers[-1] > 0:
                render = super().apply_chat_template
                whole = render(list(messages), chat_template=chat_template, **rendering)
                rendering_prompt = {**rendering, "add_generation_prompt": True}
                prompt = render(
                    list(messages[: answers[-1]]), chat_template=chat_template, **rendering_prompt
                )
                # A template of someone else's making may not extend its own prompt.
                start = len(prompt) if whole.startswith(prompt) else None
            starts.append(start)
        return starts

    def _columns(
        self, rows: list[EncodedText], side: Literal["left", "right"], length: int | None
    ) -> dict[str, list[Any]]:
        ids = [row.input_ids for row in rows]
        columns: dict[str, tuple[list[Any], Any]] = {
            "input_ids": (ids, self.tokenizer.pad_token_id),
            "attention_mask": ([[1] * len(row) for row in ids], 0),
            "token_type_ids": ([row.token_type_ids for row in rows], 0),
            "offset_mapping": ([row.offsets for row in rows], (0, 0)),
        }
        return {
            name: [_fill(values, fill, length or len(values), side) for values in column]
            for name, (column, fill) in columns.items()
        }


_TOKENIZING = {
    "tokenize",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "processor_kwargs",
}


def _deal_pictures(images: Any, texts: list[str], lenient: bool) -> list[list[Any]]:
    """Gives each row its pictures; counts are checked by the caller, row by row."""
    if images is None:
        return [[] for _ in texts]
    if not isinstance(images, list | tuple):
        images = [images]
    if any(isinstance(entry, list | tuple) for entry in images):
        if len(images) != len(texts):
            raise ModelInputError(f"{len(images)} lists of images for {len(texts)} texts")
        return [list(entry) for entry in images]
    wanted = [text.count(IMAGE_MARKER) for text in texts]
    if lenient and not any(wanted) and len(images) == len(texts):
        return [[image] for image in images]
    if len(texts) == 1:
        return [list(images)]
    if sum(wanted) != len(images):
        raise ModelInputError(count_message(sum(wanted), len(images)))
    rest = iter(images)
    return [[next(rest) for _ in range(count)] for count in wanted]


def _padded_length(
    rows: list[EncodedText],
    padding: bool | str | None,
    max_length: int | None,
    multiple: int | None,
    tensors: bool,
) -> int | None:
    if padding in (False, "do_not_pad") or (padding is None and not tensors):
        return None
    length = max(len(row.input_ids) for row in rows)
    if padding == "max_length" and max_length is not None:
        length = max(length, max_length)
    return length if not multiple else -(-length // multiple) * multiple


def _fill(values: list[Any], fill: Any, length: int, side: str) -> list[Any]:
    missing = [fill] * (length - len(values))
    return missing + values if side == "left" else values + missing


__all__ = ["IGNORE_INDEX", "CogVLMProcessor"]
