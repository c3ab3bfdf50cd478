"""Shows what training sees of a conversation: every token, its position, and what it must predict.

The columns are the input token, its rotary position (all patches of a picture share one), and the
token that the model is to predict *at* this place, which is the label of the next one. A picture
takes one line. Nothing is computed here that training computes otherwise: the rows come from
`encode_conversation`, the positions from the model.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from cogvlm_sft.checkpoint.load import load_processor
from cogvlm_sft.conversation import Conversation, read_conversations
from cogvlm_sft.data.encode import EncodedConversation, encode_conversation
from cogvlm_sft.errors import DataError
from cogvlm_sft.model.processing_cogvlm import IGNORED_LABEL, CogVLMProcessor
from cogvlm_sft.model.token_layout import build_position_ids


def preview(
    build: str | Path,
    checkpoint: str | Path,
    ids: Sequence[str] | None = None,
    limit: int = 1,
) -> str:
    """The tables of some conversations.

    Args:
        build: Conversation file or build folder.
        checkpoint: Folder whose tokenizer and picture size are used.
        ids: Which conversations; None takes the first ones.
        limit: How many, without `ids`.

    Raises:
        DataError: No such file or id, or a record that is not valid.
        CheckpointError: The folder holds no tokenizer.
    """
    processor = load_processor(checkpoint)
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
    tables = []
    for conversation in chosen:
        (row,) = encode_conversation(conversation, processor).parts
        tables.append(
            f"{conversation.id}  source {conversation.source}  style {conversation.style}\n"
            + render_row(row, processor)
        )
    return "\n\n".join(tables)


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
        label = row.labels[last + 1] if last + 1 < end else IGNORED_LABEL
        target = "" if label == IGNORED_LABEL else repr(tokenizer.convert_ids_to_tokens(label))
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
