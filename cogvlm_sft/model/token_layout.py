"""What follows from where the pictures stand in a batch: expert, position, and route of each token.

`token_type_ids` is 1 on the block `[boi, patches, eoi]` of every picture and 0 elsewhere. From it
come, as in the released code: the visual expert (boi and patches; eoi already is the language
expert's), the position ids (all patches of a picture share one), and the places that the image
features take. `Routing` puts the real tokens of a batch, padding left out, into one flat run with
the language expert's first, so that each expert works on a contiguous slice and the residual stream
needs no gather inside a layer besides the two around attention. It is built once a forward pass,
with one transfer to the host.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from cogvlm_sft.errors import ModelInputError

from .expert_rows import Parts, gather_rows

IGNORE_INDEX = -100  # label of a token without loss, torch's and TRL's


def _previous(token_type_ids: torch.Tensor) -> torch.Tensor:
    """Whether the token to the left is of an image (False in the first column)."""
    is_image = torch.zeros_like(token_type_ids, dtype=torch.bool)
    is_image[:, 1:] = token_type_ids[:, :-1] == 1
    return is_image


def _following(token_type_ids: torch.Tensor) -> torch.Tensor:
    """Whether the token to the right is of an image (False in the last column)."""
    is_image = torch.zeros_like(token_type_ids, dtype=torch.bool)
    is_image[:, :-1] = token_type_ids[:, 1:] == 1
    return is_image


def build_vision_expert_mask(token_type_ids: torch.Tensor) -> torch.Tensor:
    """Tokens that the visual expert computes: boi and patches, not eoi (released code).

    Args:
        token_type_ids: (batch, length), 1 on image blocks.

    Returns:
        (batch, length) of bool.
    """
    return (token_type_ids == 1) & _following(token_type_ids)


def build_position_ids(
    token_type_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotary positions of the released code: one id for all patches of a picture.

    BOS 0, boi 1, patches 2, eoi 3, text from 4 on. Padding takes no id of its own: right padding
    repeats the last one, left padding is 0 and the first real token then gets 1 (RoPE is relative,
    so the shift changes nothing).

    Args:
        token_type_ids: (batch, length), 1 on image blocks.
        attention_mask: (batch, length), 1 on real tokens; None means that all are.

    Returns:
        (batch, length) of int64.
    """
    is_image = token_type_ids == 1
    before = _previous(token_type_ids)
    is_patch = is_image & before & _following(token_type_ids)
    follows_patch = torch.zeros_like(is_patch)
    follows_patch[:, 1:] = is_patch[:, :-1]
    counts = ~(is_patch & follows_patch)
    if attention_mask is not None:
        counts = counts & attention_mask.to(torch.bool)
    counts[:, 0] = False
    return counts.long().cumsum(dim=1)


def count_image_blocks(token_type_ids: torch.Tensor) -> torch.Tensor:
    """(batch,) number of image blocks in each row."""
    return ((token_type_ids == 1) & ~_previous(token_type_ids)).sum(dim=1)


class Routing(NamedTuple):
    """The order in which the real tokens of a batch are computed, the language expert's first.

    A named tuple, not a dataclass, so that libraries that move inputs between devices move it.

    Attributes:
        batch, length: shape of the batch.
        language: the first so many rows belong to the language expert, the rest to the visual one.
        order: (rows,) place `row * length + column` in the batch of each computed row; None where
            every token is the language expert's and none is padding.
        single: a decoding step without autograd, for which the visual expert need not be called.
    """

    batch: int
    length: int
    language: int
    order: torch.Tensor | None
    single: bool = False

    def gather(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, length, width) to (rows, width)."""
        flat = tokens.reshape(self.batch * self.length, -1)
        return flat if self.order is None else gather_rows(flat, self.order)

    def scatter(self, *parts: torch.Tensor) -> torch.Tensor:
        """(rows, width), or consecutive parts of it, to (batch, length, width), 0 at padding."""
        if self.order is None:
            return torch.cat(parts).view(self.batch, self.length, -1)
        # With layers spread over devices the last rows are not where the batch is.
        order = self.order.to(parts[0].device)
        places = self.batch * self.length
        make = parts[0].new_empty if order.numel() == places else parts[0].new_zeros
        whole = make(places, parts[0].shape[-1])
        for part, at in zip(parts, order.split([len(part) for part in parts]), strict=True):
            whole.index_copy_(0, at, part)
        return whole.view(self.batch, self.length, -1)

    def split(self, rows: torch.Tensor) -> Parts:
        """The language expert's rows and the visual one's."""
        language, vision = rows.split([self.language, rows.shape[0] - self.language])
        return language, vision


def plan(
    token_type_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    num_image_tokens: int,
    num_images: int,
) -> tuple[Routing, torch.Tensor, bool, list[int]]:
    """Routes a batch and finds its image blocks.

    Args:
        token_type_ids: (batch, length), 1 on image blocks.
        attention_mask: (batch, length), 1 on real tokens; None means that all are.
        num_image_tokens: length of one image block.
        num_images: images handed in beside the tokens.

    Returns:
        The route; the (images * num_image_tokens,) places of the image tokens, in batch-major
        order; whether all padding stands on the right, where causal attention alone hides it; and
        the number of real tokens of each row.

    Raises:
        ModelInputError: the blocks do not match the images, or two blocks touch.
    """
    batch, length = token_type_ids.shape
    is_image = token_type_ids == 1
    starts = is_image & ~_previous(token_type_ids)
    ends = is_image & ~_following(token_type_ids)
    # Every block has the right length if the starts, moved by it, fall on the ends.
    moved = torch.zeros_like(ends)
    if length >= num_image_tokens:
        moved[:, num_image_tokens - 1 :] = starts[:, : length - num_image_tokens + 1]
    vision = build_vision_expert_mask(token_type_ids)
    kind = vision.long()
    if attention_mask is None:
        masked_image = ragged = torch.zeros((), dtype=torch.long, device=kind.device)
        lengths = torch.full((batch,), length, device=kind.device)
    else:
        real = attention_mask.to(torch.bool)
        kind = kind.masked_fill(~real, 2)
        masked_image = (is_image & ~real).sum()
        ragged = (real[:, 1:] & ~real[:, :-1]).sum()
        lengths = real.sum(dim=1)
    counts = torch.stack(
        (
            (kind == 0).sum(),
            (kind == 1).sum(),
            starts.sum(),
            is_image.sum(),
            (moved != ends).sum(),
            masked_image,
            ragged,
        )
    )
    (
        language_rows,
        vision_rows,
        blocks,
        images,
        misfits,
        masked,
        not_right,
        *row_lengths,
    ) = torch.cat((counts, lengths)).tolist()
    if misfits or masked or blocks != num_images:
        raise _mismatch(blocks, images, num_images, num_image_tokens, masked)
    order = None
    if language_rows != batch * length:
        order = torch.argsort(kind.flatten(), stable=True)[: language_rows + vision_rows]
    places = is_image.flatten().nonzero().squeeze(1)
    return Routing(batch, length, language_rows, order), places, not not_right, row_lengths


def _mismatch(
    blocks: int, tokens: int, images: int, num_image_tokens: int, masked: int
) -> ModelInputError:
    found = (
        f"Image features and image tokens do not match: {images} images make "
        f"{images * num_image_tokens} features, but token_type_ids mark {tokens} image tokens in "
        f"{blocks} blocks."
    )
    if masked:
        return ModelInputError(
            f"{found} The attention_mask hides {masked} image tokens: mark padding only."
        )
    return ModelInputError(
        f"{found} Expected one block of {num_image_tokens} tokens (boi, patches, eoi) for each "
        "image, with at least one token of text between two blocks: build the inputs with this "
        "checkpoint's CogVLMProcessor, and truncate nothing inside a block."
    )


__all__ = [
    "IGNORE_INDEX",
    "Routing",
    "build_position_ids",
    "build_vision_expert_mask",
    "count_image_blocks",
    "plan",
]
