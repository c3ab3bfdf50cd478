"""`generate()` for CogVLM: four things that transformers' own loop would get wrong.

1. Without an attention mask it would infer one from pad ids and hide every picture, since image
   placeholders hold the pad id. 2. It would count positions 0, 1, 2, where all patches share one.
3. It would type new tokens like the last one, so that an answer straight after a picture would be
   computed as a picture. 4. Expanding for beams, it would repeat each image in place and so mix the
   images of a row that has several, and lose step with rows that have none.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.generation import GenerationMixin

from cogvlm_sft.errors import ModelInputError

from .cache_cogvlm import growing
from .token_layout import build_position_ids, count_image_blocks


class CogVLMGenerationMixin(GenerationMixin):
    """Greedy, sampling and beam search over batches with and without pictures."""

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: torch.Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        ids = model_kwargs.get("input_ids")
        shape = (inputs_tensor if ids is None or ids.shape[1] == 0 else ids).shape[:2]
        return torch.ones(shape, dtype=torch.long, device=inputs_tensor.device)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        if given is None and model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"] = growing(model_kwargs["past_key_values"])

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> None:
        return None  # made at every step, from the token types of the whole sequence

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Any = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The inputs of one step: new tokens, positions cut to them, token types in full.

        Raises:
            ModelInputError: a cache is continued without the token types of what it holds, or a
                row's padding stands on its right, where its answer is to go on.
        """
        if is_first_iteration and attention_mask is not None and attention_mask.dim() == 2:
            ends = attention_mask[:, -1] == 0
            if ends.any():
                raise ModelInputError(
                    f"generate() goes on from the last column, which is padding in {ends.sum()} of "
                    f"{len(ends)} rows; pad on the left (CogVLMProcessor does unless it is given "
                    'padding_side="right")'
                )
        token_type_ids = kwargs.pop("token_type_ids", None)
        position_ids = kwargs.pop("position_ids", None)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        whole = input_ids.shape[1]
        if inputs_embeds is not None:
            # generate() keeps only the new ids when the prompt came as embeddings.
            whole += inputs_embeds.shape[1]
        if next_sequence_length is None and seen and whole <= seen:
            whole += seen  # only the new tokens were handed in
        if token_type_ids is None:
            if seen and whole > input_ids.shape[1] and inputs_embeds is None:
                raise ModelInputError(
                    f"generate() continues a cache of {seen} tokens without their token_type_ids, "
                    "so positions behind a picture are unknown; pass token_type_ids for the "
                    f"whole sequence of {whole} tokens"
                )
            token_type_ids = input_ids.new_zeros(input_ids.shape[0], whole)
        if position_ids is None:
            mask = attention_mask if attention_mask is None or attention_mask.dim() == 2 else None
            position_ids = build_position_ids(token_type_ids, mask)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            position_ids=position_ids,
            **kwargs,
        )
        inputs["token_type_ids"] = token_type_ids.to(inputs["position_ids"].device)
        return inputs

    def _update_model_kwargs_for_generation(
        self,
        outputs: Any,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        token_type_ids = model_kwargs.pop("token_type_ids", None)
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if token_type_ids is not None:
            text = token_type_ids.new_zeros(token_type_ids.shape[0], num_new_tokens)
            model_kwargs["token_type_ids"] = torch.cat((token_type_ids, text), dim=1)
        return model_kwargs

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.Tensor | None, dict[str, Any]]:
        pixel_values = model_kwargs.pop("pixel_values", None)
        token_type_ids = model_kwargs.get("token_type_ids")
        if pixel_values is not None and expand_size > 1:
            counts = [0] if token_type_ids is None else count_image_blocks(token_type_ids).tolist()
            if sum(counts) != pixel_values.shape[0]:
                raise ModelInputError(
                    "Image features and image tokens do not match: pixel_values hold "
                    f"{pixel_values.shape[0]} images, token_type_ids {sum(counts)} image blocks; "
                    "build the inputs with this checkpoint's CogVLMProcessor"
                )
            # Beams of a row stand together, so its images are repeated as a block.
            rows = [row for row in pixel_values.split(counts) for _ in range(expand_size)]
            pixel_values = torch.cat(rows)
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size,
            is_encoder_decoder=is_encoder_decoder,
            input_ids=input_ids,
            **model_kwargs,
        )
        if pixel_values is not None:
            model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs


__all__ = ["CogVLMGenerationMixin"]
