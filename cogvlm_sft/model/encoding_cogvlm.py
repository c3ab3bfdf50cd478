"""A row's text and pictures to token ids, the part of the processor that owns the layout.

BOS, then boi + patches + eoi as placeholders that hold the pad id, then the text. Text is encoded
apart from the pictures and the ids are joined, because expanding a picture inside the string
changes the tokens behind it (sentencepiece drops its leading space). In `encode_prompt` the words
of user and assistant are always plain text: "</s>" typed by a user does not end the sequence.
"""

import re
from collections.abc import Sequence
from typing import Any

from cogvlm_sft.errors import ModelInputError

from .encoded_text import EncodedText
from .image_processing_cogvlm import CogVLMImageProcessor
from .prompts import IMAGE_MARKER, PROMPTS, check_style, place_pictures

_MARKER_WITH_SPACE = re.compile(rf"\s*{IMAGE_MARKER}\s*")


class CogVLMEncodingMixin:
    """Encoding of questions, answers and rendered text with a processor's tokenizer."""

    image_processor: CogVLMImageProcessor
    tokenizer: Any
    style: str
    _answer_prefix: str

    @property
    def num_image_tokens(self) -> int:
        """Tokens that one picture takes (1227 at 490 px)."""
        return self.image_processor.num_image_tokens

    def encode_prompt(
        self,
        question: str,
        *,
        history: Sequence[tuple[str, str]] = (),
        num_images: int = 1,
        style: str | None = None,
    ) -> dict[str, list[int]]:
        """The ids that the model answers to; what training puts before an answer, too.

        Args:
            question: May hold `<image>` markers.
            history: Earlier (question, answer) pairs.
            num_images: Pictures of the row. Without any marker, the one picture stands before the
                first round.
            style: Prompt; None takes the processor's, or `text` without pictures.

        Returns:
            `input_ids` and `token_type_ids`.

        Raises:
            ModelInputError: See `encode_rounds`.
        """
        row = self.encode_rounds(question, history=history, num_images=num_images, style=style)
        return {"input_ids": row.input_ids, "token_type_ids": row.token_type_ids}

    def encode_rounds(
        self,
        question: str,
        *,
        history: Sequence[tuple[str, str]] = (),
        num_images: int = 1,
        style: str | None = None,
    ) -> EncodedText:
        """`encode_prompt` with the token ranges of the earlier answers.

        History and question are one string, as in the released code, cut only at pictures.

        Raises:
            ModelInputError: Markers and `num_images` differ, two pictures with nothing between, a
                marker in an answer, or a picture in the prompt of style `text`.
        """
        style = style or (self.style if num_images else "text")
        check_style(style)
        system, before, after = PROMPTS[style]
        asked = [*(earlier for earlier, _ in history), question]
        answers = [answer.strip() for _, answer in history]
        markers = sum(text.count(IMAGE_MARKER) for text in asked)
        if not markers and num_images:
            asked[0] = IMAGE_MARKER * num_images + asked[0]
        elif markers != num_images:
            raise ModelInputError(count_message(markers, num_images))
        if any(IMAGE_MARKER in answer for answer in answers):
            raise ModelInputError(f"an answer of the history holds {IMAGE_MARKER}; remove it")
        if style == "text" and num_images:
            raise ModelInputError(
                f"style 'text' takes no image, found {num_images}; use chat, vqa or base, "
                "or num_images=0"
            )
        text = system
        spans: list[tuple[int, int]] = []
        for index, words in enumerate(asked):
            if index:
                start = len(text)
                text += f" {answers[index - 1]}"
                spans.append((start, len(text)))
                text += "\n"
            front, words = place_pictures(words)
            text += f"{front}{before}{words}{after}"
        row = EncodedText()
        row.add([self.tokenizer.bos_token_id], 0, [(0, 0)])
        self._add_text(row, text, 0)
        row.find_answers(spans)
        return row

    def encode_answer(self, answer: str) -> list[int]:
        """The ids of a row's last answer, EOS included.

        Encoded on its own, as the released training code does: LLaMA's tokenizer then writes the
        leading space itself; a byte-level one is given it.
        """
        row = EncodedText()
        self._add_words(row, self._answer_prefix + answer.strip(), 0)
        return [*row.input_ids, self.tokenizer.eos_token_id]

    def encode_rendered(
        self, text: str, answer_start: int | None, add_special_tokens: bool
    ) -> EncodedText:
        """A text as it is, with BOS and EOS in it read as tokens."""
        bos, eos = self.tokenizer.bos_token, self.tokenizer.eos_token
        row, at = EncodedText(), 0
        if text.startswith(bos):
            at = len(bos)
            row.add([self.tokenizer.bos_token_id], 0, [(0, at)])
        elif add_special_tokens or IMAGE_MARKER in text:
            row.add([self.tokenizer.bos_token_id], 0, [(0, 0)])
        else:
            # TRL encodes completions by themselves.
            answer_start = 0
        cuts = [(match.start(), match.end()) for match in re.finditer(re.escape(eos), text[at:])]
        for start, end in [*((at + i, at + j) for i, j in cuts), (len(text), len(text))]:
            if answer_start is not None and at <= answer_start < start:
                self._add_text(row, text[at:answer_start], at)
                at = answer_start
                if not self._answer_prefix and text[at] == " ":
                    at += 1
                answer_start = None
            self._add_text(row, text[at:start], at)
            if end > start:
                row.add([self.tokenizer.eos_token_id], 0, [(start, end)])
            at = end
        return row

    def _add_text(self, row: EncodedText, text: str, start: int) -> None:
        """Appends a text and the pictures in it; the white space round a picture goes with it."""
        at = 0
        for match in _MARKER_WITH_SPACE.finditer(text):
            self._add_words(row, text[at : match.start()], start + at)
            if row.token_type_ids and row.token_type_ids[-1] == 1:
                raise ModelInputError(
                    "two images with nothing between them: CogVLM would read the first one's last "
                    "token as the second's; put words between the <image> markers, such as "
                    '"Picture 1: <image> Picture 2: <image>"'
                )
            count = self.num_image_tokens
            row.add([self.tokenizer.pad_token_id] * count, 1, [(0, 0)] * count)
            at = match.end()
        self._add_words(row, text[at:], start + at)

    def _add_words(self, row: EncodedText, text: str, start: int) -> None:
        if not text:
            return
        encoded = self.tokenizer(
            text,
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        offsets = [(start + i, start + j) for i, j in encoded["offset_mapping"]]
        row.add(encoded["input_ids"], 0, offsets)


def count_message(markers: int, images: int) -> str:
    """Says that markers and images differ."""
    return (
        f"{markers} {IMAGE_MARKER} marker(s) in the text but {images} image(s); "
        "every image needs one marker"
    )


__all__ = ["CogVLMEncodingMixin", "count_message"]
