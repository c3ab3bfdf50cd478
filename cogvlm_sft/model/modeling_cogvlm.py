"""CogVLM native to transformers 5: a Llama-shaped decoder with a visual expert in every layer.

Modules and parameters carry the released names, so that files need no mapping in either direction.
The residual stream is kept as one flat run of real tokens, the language expert's before the visual
expert's (`token_layout.Routing`, built once a forward pass): padding is not computed, and each
expert is an ordinary `nn.Linear` over a slice. A training step goes further (`supervised_only`):
attention runs over segments instead of a padded grid, the last layer and the head compute only what
the loss reads, and conversations may share a picture (`segments`). Rotary angles are computed in
fp32 from the configuration; the `inv_freq` buffers exist because released files hold them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from cogvlm_sft.errors import ModelInputError

from .attention_cogvlm import (
    Angles,
    CogVLMAttention,
    CogVLMRotaryEmbedding,
    inverse_frequencies,
)
from .cache_cogvlm import growing
from .configuration_cogvlm import CogVLMConfig
from .expert_rows import gather_rows
from .generation_cogvlm import CogVLMGenerationMixin
from .layers_cogvlm import CogVLMDecoderLayer, CogVLMRMSNorm
from .linear_cogvlm import apply_linear
from .loss_cogvlm import summed_cross_entropy
from .runs import FLAT_ATTENTION, choose_reads, flatten
from .segments import Segment, read_segments, segments_of_rows
from .token_layout import IGNORE_INDEX, Routing, build_position_ids, build_vision_expert_mask, plan
from .vision_cogvlm import CogVLMPatchEmbedding, CogVLMVisionModel


class CogVLMPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    config: CogVLMConfig
    config_class = CogVLMConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["CogVLMDecoderLayer", "CogVLMVisionLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _keys_to_ignore_on_load_missing = [r"self_attn\.rotary_emb\.inv_freq$"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"attentions": CogVLMAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with `initializer_range`, positions at the scale of patches; norms 1, 0."""
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, CogVLMVisionModel):
            init.normal_(module.boi, mean=0.0, std=std)
            init.normal_(module.eoi, mean=0.0, std=std)
        elif isinstance(module, CogVLMPatchEmbedding):
            init.normal_(module.cls_embedding, mean=0.0, std=std)
            # As large as the patch embedding of unit-variance pixels: smaller ones are drowned by
            # it, and a fresh tower then takes several times as long to learn where things are.
            fan_in = module.proj.weight[0].numel()
            init.normal_(module.position_embedding.weight, mean=0.0, std=std * fan_in**0.5)
        elif isinstance(module, CogVLMRotaryEmbedding):
            init.copy_(module.inv_freq, inverse_frequencies(module.config))

    def recompute_mlp(self, enabled: bool = True) -> None:
        """Selective checkpointing: keeps attention's tensors, computes the MLPs a second time."""
        for layer in self._decoder_layers():
            layer.recompute_mlp = enabled

    def compile_layers(self) -> None:
        """Compiles every decoder layer, for any shape and without a break in its graph."""
        for layer in self._decoder_layers():
            layer.compile(dynamic=True, fullgraph=True)

    def _decoder_layers(self) -> list[CogVLMDecoderLayer]:
        return [module for module in self.modules() if isinstance(module, CogVLMDecoderLayer)]


class CogVLMModel(CogVLMPreTrainedModel):
    """Embeddings, pictures and decoder layers, up to the final norm."""

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__(config)
        # As released: the pad row takes no gradient. It must, where pad is also a token of its own.
        eos = (
            config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        )
        pad = None if config.pad_token_id in (config.bos_token_id, *eos) else config.pad_token_id
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=pad)
        self.layers = nn.ModuleList(
            CogVLMDecoderLayer(config, index) for index in range(config.num_hidden_layers)
        )
        self.norm = CogVLMRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision = CogVLMVisionModel(config)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        read_places: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Runs the backbone.

        Args:
            input_ids: (batch, length); image placeholders may hold any id.
            attention_mask: (batch, seen + length), 1 on real tokens; None means that all are.
            token_type_ids: 1 on image blocks, (batch, seen + length), or (batch, length) if
                `position_ids` are given too; None means text only.
            position_ids: (batch, length); None builds CogVLM's.
            pixel_values: (images in the batch, 3, side, side), batch-major.
            past_key_values: cache with the `seen` tokens.
            inputs_embeds: (batch, length, hidden) in place of `input_ids`.
            use_cache: whether to return a cache; None: as configured, but never in training.
            output_hidden_states: whether to return the states around every layer.
            read_places: (reads,) ascending places `row * length + column` of real tokens: the last
                layer computes its output there only.
            segments: (segments, 3) start, end and prefix (or -1) of each segment of a batch of one
                packed row, see `segments.py`; needs `position_ids`. A branch begins with an eoi of
                its own, which only the first branch of a prefix marks in `token_type_ids`.
            **kwargs: for the attention implementation (and `output_attentions`, `return_dict`).

        Returns:
            `last_hidden_state` (batch, length, hidden), zero at padding; or (reads, hidden).

        Raises:
            ModelInputError: tokens and images contradict each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ModelInputError("expected exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
            device = inputs_embeds.device.type
            if torch.is_autocast_enabled(device):
                # Embeddings that learn are fp32, and autocast leaves them so; the states would be
                # fp32 from here on, and with them the output of 4-bit linears, whose dtype is their
                # input's, and what attention gets of it.
                inputs_embeds = inputs_embeds.to(torch.get_autocast_dtype(device))
        batch, length, _ = inputs_embeds.shape
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and segments is None
        if use_cache and past_key_values is None:
            past_key_values = growing(DynamicCache(config=self.config))
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        mask = attention_mask if attention_mask is None or attention_mask.dim() == 2 else None
        if token_type_ids is None and not seen:
            token_type_ids = torch.zeros(
                batch, length, dtype=torch.long, device=inputs_embeds.device
            )
        if position_ids is None:
            if token_type_ids is None or token_type_ids.shape[1] != seen + length:
                covered = 0 if token_type_ids is None else token_type_ids.shape[1]
                raise ModelInputError(
                    f"token_type_ids cover {covered} tokens; expected all {seen + length} ({seen} "
                    f"in the cache, {length} new): "
                    "positions behind a picture depend on them (or pass position_ids)"
                )
            position_ids = build_position_ids(token_type_ids, mask)[:, -length:]
        if token_type_ids is None:
            token_type_ids = torch.zeros(
                batch, length, dtype=torch.long, device=inputs_embeds.device
            )

        if pixel_values is not None and pixel_values.shape[0] == 0:
            pixel_values = None
        lengths: list[int] = []
        if seen and length == 1 and pixel_values is None and not torch.is_grad_enabled():
            routing = Routing(batch, length, batch, None, single=True)
        else:
            routing, places, right, lengths = plan(
                token_type_ids[:, -length:],
                None if mask is None else mask[:, -length:],
                self.config.num_image_tokens,
                0 if pixel_values is None else pixel_values.shape[0],
            )
            inputs_embeds = self._place_images(inputs_embeds, pixel_values, places)
            if mask is not None and not seen and right and not self._uses_flash():
                attention_mask = None  # causal attention alone hides what stands on the right
        run_segments = self._segments(segments, lengths, (batch, length))
        if segments is not None:
            inputs_embeds = self._place_branches(inputs_embeds, run_segments)
        rows = routing.gather(inputs_embeds)
        angles = self._angles(position_ids)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        recorded = output_hidden_states or bool(kwargs.get("output_attentions"))
        masked = attention_mask is not None and attention_mask.dim() != 2
        if self._runs_flat(read_places, segments, past_key_values, recorded, masked):
            hidden = self._run_flat(rows, routing, run_segments, angles, mask, read_places, kwargs)
            return BaseModelOutputWithPast(last_hidden_state=hidden)
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            # Never position_ids: shared image positions would be read as document breaks.
        )
        states = [inputs_embeds] if output_hidden_states else []
        for index, layer in enumerate(self.layers):
            rows = layer(
                rows,
                routing,
                angles,
                attention_mask=causal_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
            if output_hidden_states and index < len(self.layers) - 1:
                states.append(routing.scatter(rows))
        hidden = routing.scatter(self.norm(rows))
        return BaseModelOutputWithPast(
            last_hidden_state=hidden
            if read_places is None
            else gather_rows(hidden.flatten(0, 1), read_places),
            past_key_values=past_key_values,
            hidden_states=(*states, hidden) if output_hidden_states else None,
        )

    def _segments(
        self, table: torch.Tensor | None, lengths: list[int], shape: tuple[int, int]
    ) -> list[Segment]:
        """The segments of the run: those handed in, or the rows."""
        if table is None:
            return segments_of_rows([length for length in lengths if length])
        if shape[0] != 1 or lengths != [shape[1]]:
            raise ModelInputError(
                f"segments describe one row without padding; found a batch of {shape[0]} rows with "
                f"{lengths} real tokens of {shape[1]}"
            )
        return read_segments(table, shape[1])

    def _place_branches(self, inputs_embeds: torch.Tensor, segments: list[Segment]) -> torch.Tensor:
        """Begins every branch with eoi; the first one's is the end of the picture's block."""
        later = [s.start for s in segments if s.prefix >= 0 and s.start != segments[s.prefix].end]
        if not later:
            return inputs_embeds
        places = torch.tensor(later, device=inputs_embeds.device)
        eoi = self.vision.eoi[0].to(inputs_embeds.dtype).expand(len(later), -1)
        return inputs_embeds[0].index_copy(0, places, eoi)[None]

    def _runs_flat(
        self,
        read_places: torch.Tensor | None,
        segments: torch.Tensor | None,
        past_key_values: Cache | None,
        recorded: bool,
        masked: bool,
    ) -> bool:
        """Whether attention goes over segments: in training, unless states are asked for."""
        if read_places is None and segments is None:
            return False
        implementation = self.config._attn_implementation
        cached = past_key_values is not None
        possible = not (cached or recorded or masked) and implementation in FLAT_ATTENTION
        if segments is not None and not possible:
            raise ModelInputError(
                "segments go without a cache, a mask of one's own and recorded states, and with "
                f"attention {', '.join(FLAT_ATTENTION)}; found {implementation}"
                f"{', a cache' * cached}{', a mask' * masked}{', recorded states' * recorded}"
            )
        return possible

    def _run_flat(
        self,
        rows: torch.Tensor,
        routing: Routing,
        segments: list[Segment],
        angles: Angles,
        mask: torch.Tensor | None,
        read_places: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """The layers over a run; (batch, length, hidden), or (reads, hidden)."""
        device = rows.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else rows.dtype
        implementation = self.config._attn_implementation
        run, where = flatten(routing, segments, angles, mask, dtype, implementation)
        reads, back = None, None
        if read_places is not None:
            places = read_places if where is None else where[read_places]
            reads, back = choose_reads(run, segments, places, dtype, implementation)
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            rows = layer(rows, run, reads=reads if index == last else None, **kwargs)
        rows = self.norm(rows)
        if reads is None:
            return routing.scatter(rows)
        return rows if back is None else gather_rows(rows, back)

    def _place_images(
        self,
        inputs_embeds: torch.Tensor,
        pixel_values: torch.Tensor | None,
        places: torch.Tensor,
    ) -> torch.Tensor:
        """Puts the image features over their placeholders, or adds their zero without images."""
        if pixel_values is None:
            return inputs_embeds + self.vision(None).to(inputs_embeds)
        features = self.vision(pixel_values).flatten(0, 1).to(inputs_embeds)
        flat = inputs_embeds.flatten(0, 1)
        return flat.index_copy(0, places, features).view_as(inputs_embeds)

    def _uses_flash(self) -> bool:
        return "flash" in (self.config._attn_implementation or "")

    def _angles(self, position_ids: torch.Tensor) -> Angles:
        """Cosine and sine in fp32, (batch, 1, length, head size / 2)."""
        with torch.no_grad(), torch.autocast(position_ids.device.type, enabled=False):
            frequencies = inverse_frequencies(self.config, position_ids.device)
            angles = position_ids[:, None, :, None].float() * frequencies
            return angles.cos(), angles.sin()


class CogVLMForCausalLM(CogVLMPreTrainedModel, CogVLMGenerationMixin):
    """CogVLM with its language modelling head: training and `generate()`."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CogVLMConfig) -> None:
        super().__init__(config)
        self.model = CogVLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        supervised_only: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Runs the model; see `CogVLMModel.forward` for the inputs not named here.

        Args:
            input_ids: (batch, length).
            attention_mask: (batch, seen + length).
            token_type_ids: (batch, seen + length).
            position_ids: (batch, length).
            pixel_values: (images in the batch, 3, side, side), batch-major.
            labels: (batch, length), token to predict *at* each position (shifted here), or -100.
            past_key_values: cache.
            inputs_embeds: (batch, length, hidden).
            use_cache: whether to return a cache.
            logits_to_keep: logits of the last so many positions only (0: all), or of these.
            supervised_only: compute the head, and what of the last layer nobody else reads, only
                where the shifted label is not -100. Same loss and gradients; `logits` is None.
            num_items_in_batch: divisor of the summed loss; None: the labels counted here.
            **kwargs: for the backbone.

        Returns:
            Loss (fp32 cross-entropy), logits, cache.

        Raises:
            ModelInputError: tokens and images contradict each other, or `supervised_only` comes
                without labels.
        """
        targets = None if labels is None else _shift(labels, attention_mask)
        read_places = None
        if supervised_only:
            if targets is None:
                raise ModelInputError("supervised_only=True needs labels; pass them")
            read_places = (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
            use_cache = False
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            pixel_values=pixel_values,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            read_places=read_places,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if supervised_only:
            assert targets is not None and read_places is not None
            scores = apply_linear(self.lm_head, hidden)
            read = targets.flatten()[read_places]
            loss = _mean(summed_cross_entropy(scores, read), read, num_items_in_batch)
        elif targets is not None:
            logits = apply_linear(self.lm_head, hidden)
            total = functional.cross_entropy(
                logits.flatten(0, 1).float(),
                targets.flatten(),
                ignore_index=IGNORE_INDEX,
                reduction="sum",
            )
            loss = _mean(total, targets, num_items_in_batch)
        if logits is not None or not supervised_only:
            keep = (
                slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            )
            logits = (
                apply_linear(self.lm_head, hidden[:, keep]) if logits is None else logits[:, keep]
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def _shift(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """(batch, length) label of the next token, -100 in the last column and at padding."""
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask[:, -labels.shape[1] :].to(torch.bool)
        targets = targets.masked_fill(~real, IGNORE_INDEX)
    return targets


def _mean(
    total: torch.Tensor, targets: torch.Tensor, num_items: torch.Tensor | int | None
) -> torch.Tensor:
    """The summed loss divided by `num_items`, or else by the targets; 0 without a target."""
    if num_items is None:
        return total / (targets != IGNORE_INDEX).sum().clamp(min=1)
    return total / (num_items.to(total.device) if torch.is_tensor(num_items) else num_items)


__all__ = [
    "CogVLMForCausalLM",
    "CogVLMModel",
    "CogVLMPreTrainedModel",
    "build_position_ids",
    "build_vision_expert_mask",
]
