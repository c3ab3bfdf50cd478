"""A conversation to token ids and labels, exactly as inference will see it.

History and prompt go through `CogVLMProcessor.encode_rounds`, the code that inference calls, and
earlier answers are found in them by character offsets; the last answer is encoded on its own. Every
answer carries loss by default. Behind an earlier answer the *input* is the separator, as at
inference, and the *label* there is EOS, so the model learns to stop at each turn and still sees
exactly the released prompts. Where a tokenizer merges the separator into the answer's last token
(".\\n" is one token of Llama-3) there is no place for that EOS: it is left out and counted, and the
merged token's label is the token that the answer alone would end with. Nothing is ever cut inside a
picture or an answer: too long a conversation is split between rounds.
"""

from dataclasses import dataclass
from typing import Literal

from cogvlm_sft.conversation import IMAGE_MARKER, Conversation, Turn
from cogvlm_sft.errors import DataError, ModelInputError
from cogvlm_sft.model.processing_cogvlm import IGNORE_INDEX, CogVLMProcessor

LossOn = Literal["all", "last"]
Round = tuple[Turn, Turn]


@dataclass(frozen=True, slots=True)
class EncodedConversation:
    """One training row.

    Attributes:
        input_ids: Token ids; pictures are runs of the pad id.
        token_type_ids: 1 on boi, patches and eoi.
        labels: Ids to predict at each place, `IGNORE_INDEX` where there is no loss. Not shifted.
        images: Paths relative to the image root, in the order of their places.
    """

    input_ids: list[int]
    token_type_ids: list[int]
    labels: list[int]
    images: tuple[str, ...]

    @property
    def supervised(self) -> int:
        """Places that carry loss."""
        return sum(label != IGNORE_INDEX for label in self.labels)


@dataclass(frozen=True, slots=True)
class EncodeResult:
    """What became of one conversation.

    Attributes:
        parts: The rows; more than one where it was split to fit, none where nothing fits.
        dropped_rounds: Rounds that are over the length by themselves.
        unsupervised_ends: Supervised earlier answers whose EOS has no place.
    """

    parts: tuple[EncodedConversation, ...]
    dropped_rounds: int = 0
    unsupervised_ends: int = 0


def encode_conversation(
    conversation: Conversation,
    processor: CogVLMProcessor,
    max_length: int | None = None,
    loss_on: LossOn = "all",
) -> EncodeResult:
    """Encodes a conversation into one row, or into several where it is too long for one.

    A row ends with an answer that carries loss; rounds behind the last such answer are left out. A
    part that starts without a picture of its own is given the latest one before it.

    Args:
        conversation: A validated conversation.
        processor: Its tokenizer and picture size.
        max_length: Most tokens of a row; None for no limit.
        loss_on: `all` answers that allow it, or the `last` of each row, as the official code does.

    Raises:
        DataError: No answer may carry loss; `max_length` cannot hold a picture; two pictures with
            nothing between.
    """
    _check_length(conversation, processor, max_length)
    rounds = conversation.rounds()
    while rounds and not rounds[-1][1].train:
        rounds.pop()
    if not rounds:
        raise DataError(
            f"conversation {conversation.id}: every answer has train: false, so there is nothing "
            "to learn; remove the conversation or the flag"
        )
    images = conversation.images
    try:
        whole = _encode_rounds(conversation, rounds, images, processor, loss_on)
        if max_length is None or len(whole[0].input_ids) <= max_length:
            return EncodeResult((whole[0],), 0, whole[1])
        return _split(conversation, rounds, processor, max_length, loss_on)
    except ModelInputError as error:
        raise DataError(f"conversation {conversation.id}: {error}") from None


def _split(
    conversation: Conversation,
    rounds: list[Round],
    processor: CogVLMProcessor,
    max_length: int,
    loss_on: LossOn,
) -> EncodeResult:
    """Takes as many rounds into each part as fit, from the first on."""
    parts: list[EncodedConversation] = []
    start = dropped = ends = 0
    while start < len(rounds):
        best: tuple[EncodedConversation, int] | None = None
        stop = following = start + 1
        while stop <= len(rounds):
            # A part closes with an answer that carries loss.
            if rounds[stop - 1][1].train:
                chosen, images = _with_pictures(conversation.images, rounds, start, stop)
                encoded = _encode_rounds(conversation, chosen, images, processor, loss_on)
                if len(encoded[0].input_ids) > max_length:
                    break
                best, following = encoded, stop
            stop += 1
        if best is None:
            dropped += 1
        else:
            parts.append(best[0])
            ends += best[1]
        start = following
    return EncodeResult(tuple(parts), dropped, ends)


def _with_pictures(
    images: tuple[str, ...], rounds: list[Round], start: int, stop: int
) -> tuple[list[Round], tuple[str, ...]]:
    """Rounds [start, stop) with the pictures that they refer to."""
    counts = [question.content.count(IMAGE_MARKER) for question, _ in rounds]
    before, inside = sum(counts[:start]), sum(counts[start:stop])
    chosen, own = rounds[start:stop], images[before : before + inside]
    if before and not counts[start]:
        question, answer = chosen[0]
        carried = Turn("user", f"{IMAGE_MARKER}\n{question.content}", question.train)
        return [(carried, answer), *chosen[1:]], (images[before - 1], *own)
    return chosen, own


def _encode_rounds(
    conversation: Conversation,
    rounds: list[Round],
    images: tuple[str, ...],
    processor: CogVLMProcessor,
    loss_on: LossOn,
) -> tuple[EncodedConversation, int]:
    """One row and the number of its answers whose EOS has no place."""
    *earlier, (question, answer) = rounds
    images = images[: sum(asked.content.count(IMAGE_MARKER) for asked, _ in rounds)]
    row = processor.encode_rounds(
        question.content,
        history=[(asked.content, answered.content) for asked, answered in earlier],
        num_images=len(images),
        style=conversation.style,
    )
    last = processor.encode_answer(answer.content)
    labels = [IGNORE_INDEX] * len(row.input_ids) + last
    eos, unsupervised = last[-1], 0
    spans = zip(earlier, row.answers, row.merged, strict=True)
    for (_, answered), (start, end), merged in spans if loss_on == "all" else ():
        if not answered.train or start == end:
            continue
        labels[start:end] = row.input_ids[start:end]
        if merged:
            alone = processor.encode_answer(answered.content)[:-1]
            same = alone[:-1] == row.input_ids[start : end - 1]
            labels[end - 1] = alone[-1] if same else IGNORE_INDEX
            unsupervised += 1
        else:
            labels[end] = eos
    encoded = EncodedConversation(
        row.input_ids + last, row.token_type_ids + [0] * len(last), labels, images
    )
    return encoded, unsupervised


def _check_length(
    conversation: Conversation, processor: CogVLMProcessor, max_length: int | None
) -> None:
    # BOS in front of the picture, and behind it at least one token of an answer and EOS.
    needed = processor.num_image_tokens + 3
    if max_length is not None and conversation.images and max_length < needed:
        raise DataError(
            f"max_length is {max_length}, but one image takes {processor.num_image_tokens} tokens "
            f"and its row at least {needed}; raise data.max_length or use smaller pictures"
        )
