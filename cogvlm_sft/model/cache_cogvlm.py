"""A cache whose layers grow in place.

transformers' dynamic cache joins old and new keys and values at every token, which copies all of
them; at a batch of 8 that is a fifth of a decoding step on a CPU. These layers keep room behind
what they hold, write new tokens into it, and copy only when the room is used up. What they hand out
and every other operation of the cache is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

# Tokens of room behind those held.
_ROOM = 128


class GrowingLayer(DynamicLayer):
    """Keys and values (batch, heads, tokens, head size) as views of longer tensors."""

    keys: torch.Tensor
    values: torch.Tensor
    _whole: tuple[torch.Tensor, torch.Tensor] | None = None
    _view: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends new tokens; returns all of them."""
        if torch.is_grad_enabled():  # a gradient may need what would be overwritten
            return super().update(key_states, value_states, *args, **kwargs)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = self.get_seq_length()
        end = seen + key_states.shape[-2]
        if not self._has_room(end):
            shape = (*key_states.shape[:2], end + _ROOM, key_states.shape[-1])
            self._whole = key_states.new_empty(shape), value_states.new_empty(shape)
            if seen:
                for whole, held in zip(self._whole, (self.keys, self.values), strict=True):
                    whole[:, :, :seen] = held
        assert self._whole is not None
        for whole, fresh in zip(self._whole, (key_states, value_states), strict=True):
            whole[:, :, seen:end] = fresh
        self.keys, self.values = (whole[:, :, :end] for whole in self._whole)
        self._view = self.keys
        return self.keys, self.values

    def _has_room(self, end: int) -> bool:
        """Whether the view is still what was handed out last, and `end` tokens fit behind it."""
        return (
            self._whole is not None
            and self.keys is self._view  # else cropped, reordered or moved meanwhile
            and end <= self._whole[0].shape[2]
            and (torch.is_inference_mode_enabled() or not self._whole[0].is_inference())
        )


def growing(cache: Cache) -> Cache:
    """Lets an empty dynamic cache grow in place; other caches stay as they are."""
    if type(cache) is DynamicCache:
        cache.layers = [
            GrowingLayer() if type(layer) is DynamicLayer and not layer.is_initialized else layer
            for layer in cache.layers
        ]
    return cache


__all__ = ["GrowingLayer", "growing"]
