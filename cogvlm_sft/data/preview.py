"""Shows what training sees of a conversation: every token, its position, and what it must predict.

The columns are the input token, its rotary position (all patches of a picture share one), and the
token that the model is to predict *at* this place, which is the label of the next one. A picture
takes one line, with its size on disk and the size that the model gets. Nothing is computed here
that training computes otherwise: the rows come from `encode_conversation`, the positions from the
model. `preview_page` draws the same rows with the pictures themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cogvlm_sft.conversation import Conversation, read_conversations, resolve_image
from cogvlm_sft.data.encode import EncodedConversation, LossOn, encode_conversation
from cogvlm_sft.data.pictures import read_picture
from cogvlm_sft.errors import DataError
from cogvlm_sft.model.processing_cogvlm import IGNORE_INDEX, CogVLMProcessor
from cogvlm_sft.model.token_layout import build_position_ids


@dataclass(frozen=True, slots=True)
class Previewed:
    """A conversation and the rows that it becomes.

    Attributes:
        conversation: As it stands in the build.
        rows: What training gets: one row, or several where it is split to fit.
        dropped_rounds: Rounds that are over the length by themselves.
    """

    conversation: Conversation
    rows: tuple[EncodedConversation, ...]
    dropped_rounds: int


def encode_chosen(
    build: str | Path,
    processor: CogVLMProcessor,
    *,
    ids: Sequence[str] | None = None,
    limit: int = 1,
    max_length: int | None = None,
    loss_on: LossOn = "all",
) -> list[Previewed]:
    """Encodes some conversations of a build as training would.

    Args:
        build: Conversation file or build folder.
        processor: Tokenizer and picture size.
        ids: Which conversations; None takes the first ones.
        limit: How many, without `ids`.
        max_length: Most tokens of a row, as in a recipe's `data.max_length`.
        loss_on: As in a recipe's `data.loss_on`.

    Raises:
        DataError: No such file or id, or a record that is not valid.
    """
    wanted = set(ids or ())
    chosen: list[Conversation] = []
    for conversation in read_conversations(Path(build)):
        if not ids or conversation.id in wanted:
            chosen.append(conversation)
            wanted.discard(conversation.id)
        if (ids and not wanted) or (not ids and len(chosen) >= limit):
            break
    if wanted:
        raise DataError(f"{build}: holds no conversation with id {sorted(wanted)[0]!r}")
    if not chosen:
        raise DataError(f"{build}: holds no conversation")
    previewed = []
    for conversation in chosen:
        encoded = encode_conversation(conversation, processor, max_length, loss_on)
        previewed.append(Previewed(conversation, encoded.parts, encoded.dropped_rounds))
    return previewed


def render_text(
    previewed: Sequence[Previewed], processor: CogVLMProcessor, image_root: Path | None = None
) -> str:
    """The tables of conversations.

    Args:
        previewed: See `encode_chosen`.
        processor: Names the tokens.
        image_root: Where the pictures are; without it their sizes are left out.
    """
    blocks = []
    for one in previewed:
        conversation = one.conversation
        lines = [f"{conversation.id}  source {conversation.source}  style {conversation.style}"]
        lines += [picture_line(name, processor, image_root) for name in conversation.images]
        if one.dropped_rounds:
            lines.append(f"{one.dropped_rounds} round(s) are over the length and dropped")
        for number, row in enumerate(one.rows, start=1):
            if len(one.rows) > 1:
                lines.append(f"part {number} of {len(one.rows)}")
            lines.append(render_row(row, processor))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def picture_line(name: str, processor: CogVLMProcessor, image_root: Path | None) -> str:
    """What is on disk of a picture, and what the model gets of it."""
    size = processor.image_processor.size
    given = f"{size['width']} x {size['height']} to the model"
    tokens = f"{processor.num_image_tokens} tokens"
    if image_root is None:
        return f"picture [{name}]  {given}, {tokens}"
    try:
        picture = read_picture(resolve_image(image_root, name), name)
    except DataError as error:
        return f"picture [{name}]  {error}"
    return f"picture [{name}]  {picture.width} x {picture.height} on disk, {given}, {tokens}"


def render_row(row: EncodedConversation, processor: CogVLMProcessor) -> str:
    """One encoded row as a table.

    Args:
        row: What training gets.
        processor: Names the tokens.
    """
    tokenizer = processor.tokenizer
    positions = build_position_ids(torch.tensor([row.token_type_ids]))[0].tolist()
    lines = [f"{'place':>11}  {'position':>9}  {'id':>6}  {'token':24}  learns to predict"]
    pictures = iter(row.images)
    place, end = 0, len(row.input_ids)
    while place < end:
        last = place
        if row.token_type_ids[place]:
            # A picture's end is known from its length, so the next one's start would be too.
            last = place + processor.num_image_tokens - 1
            name = f"[{next(pictures)}]"
            identity = ""
        else:
            name = repr(tokenizer.convert_ids_to_tokens(row.input_ids[place]))
            identity = str(row.input_ids[place])
        label = row.labels[last + 1] if last + 1 < end else IGNORE_INDEX
        target = "" if label == IGNORE_INDEX else repr(tokenizer.convert_ids_to_tokens(label))
        where = str(place) if last == place else f"{place}-{last}"
        position = str(positions[place])
        if last != place:
            position += f"-{positions[last]}"
        lines.append(f"{where:>11}  {position:>9}  {identity:>6}  {name:24}  {target}".rstrip())
        place = last + 1
    lines.append(
        f"{end} tokens, {sum(row.token_type_ids)} of {len(row.images)} picture(s), "
        f"{row.supervised} with loss"
    )
    return "\n".join(lines)
