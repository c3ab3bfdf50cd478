"""Floating-point operations that a training step needs, by formula.

Counted are matrix products and attention, as two operations a multiply-add, and only those that
the loss depends on: the head at supervised positions, of the last layer everything behind its keys
and values at supervised positions too, causal attention at half of its square, the backward pass
through what learns or lies above it. Not counted: element-wise work, padding, and what gradient
checkpointing computes a second time. MFU by these counts is therefore the usual one (PaLM,
appendix B) on active operations, and lower than one that counts logits nobody reads.
"""

from collections.abc import Collection
from dataclasses import dataclass

from cogvlm_sft.model import CogVLMConfig


@dataclass(frozen=True, slots=True)
class Work:
    """What one or more batches hold; the counts are linear, so they may be summed.

    Attributes:
        tokens: real tokens of all rows, image places among them.
        squares: sum over rows of their length squared; twice the query-key pairs of attention.
        images: pictures.
        supervised: positions that carry loss.
    """

    tokens: float
    squares: float
    images: float
    supervised: float


def forward_flops(config: CogVLMConfig, work: Work) -> dict[str, float]:
    """Operations of a forward pass, by part.

    Returns:
        `patches` (the tower's convolution), `vision_tower` (its layers), `projection` (of its
        features to the model's width), `adapter` (the gated unit behind it), `language` (linears at
        text positions), `visual_expert` (at image positions), `attention` (scores and values of the
        language model) and `head`.
    """
    vision = config.vision_config
    patches = vision.grid**2
    grid = patches // 4 if config.is_cogvlm2 else patches
    hidden, inner = config.hidden_size, config.intermediate_size
    block = (
        2
        * vision.num_positions
        * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size)
        + 4 * vision.num_positions**2 * vision.hidden_size
    )
    tower = vision.num_hidden_layers * block
    pixels = 2 * patches * vision.hidden_size * vision.in_channels * vision.patch_size**2
    projection = 2 * grid * vision.hidden_size * hidden
    if config.is_cogvlm2:
        projection += 2 * grid * vision.hidden_size**2 * 4  # the convolution's 2 x 2 kernel
    unit = 2 * grid * 3 * hidden * inner

    # All but the last of a picture's places (boi, patches, eoi) go to the visual expert.
    on_image = work.images * (config.num_image_tokens - 1)
    on_text = work.tokens - on_image
    keys = 2 * hidden * config.num_key_value_heads * (hidden // config.num_attention_heads)
    rest = 2 * hidden**2 + 3 * hidden * inner  # queries, output, MLP
    layers = config.num_hidden_layers
    last = 2 * work.supervised * rest
    return {
        "patches": work.images * pixels,
        "vision_tower": work.images * tower,
        "projection": work.images * projection,
        "adapter": work.images * unit,
        "language": 2 * on_text * (layers * keys + (layers - 1) * rest) + last,
        "visual_expert": 2 * on_image * (layers * keys + (layers - 1) * rest),
        "attention": 2 * hidden * work.squares * (layers - 1) + 4 * hidden * _last_pairs(work),
        "head": 2 * work.supervised * hidden * config.vocab_size,
    }


def training_flops(config: CogVLMConfig, trained: Collection[str], work: Work) -> float:
    """Operations of a forward and backward pass.

    Args:
        config: the model.
        trained: parameter groups whose matrices get gradients; adapters of low rank on a group add
            next to nothing, so a group trained by LoRA alone is left out.
        work: what the batches hold.
    """
    part = forward_flops(config, work)
    total = sum(part.values())
    # Gradients pass through the whole language model down to its first layer and to the image
    # features, wherever in it or below it something learns.
    total += part["language"] + part["visual_expert"] + part["head"] + 2 * part["attention"]
    for group in ("language", "visual_expert"):
        if group in trained:
            total += part[group]
    if "embeddings" in trained:
        total += part["head"]
    if "adapter" in trained:
        total += part["projection"] + 2 * part["adapter"]
    if "vision_tower" in trained:
        total += part["patches"] + 2 * part["vision_tower"] + part["projection"]
        if "adapter" not in trained:
            total += part["adapter"]
    return total


def _last_pairs(work: Work) -> float:
    """Query-key pairs of the last layer, where only supervised positions ask.

    They stand behind most of their row, so each is taken to see a row of mean length.
    """
    if not work.tokens:
        return 0.0
    return work.supervised * work.squares / work.tokens
