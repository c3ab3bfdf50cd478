"""Where the memory of a training step goes, by part, from shapes alone.

States are exact counts: weights (fp32 where they learn, the recipe's dtype where they are frozen,
NF4 with its block scales where they are quantised), gradients, optimizer, and what spreading over
GPUs adds. Activations follow what this model's autograd functions keep (`model.expert_rows`,
`segment_attention`): a layer keeps its residual input, the rotated queries, keys and values, the
attention's output and the two inputs of SwiGLU; a linear keeps its input only if it learns, or if a
low-rank factor beside it does; with gradient checkpointing the residual inputs of all layers and
one whole layer; with that of the MLPs only, what attention keeps. To that comes the larger of what
the head and what one layer's backward hold for a moment. A frozen tower keeps nothing; its widest
block counts only where it exceeds all of that.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from cogvlm_sft.model import CogVLMConfig, CogVLMForCausalLM
from cogvlm_sft.recipe import GroupTuning, Recipe
from cogvlm_sft.tune.groups import GROUPS, GroupSummary, group_of
from cogvlm_sft.tune.naming import linears_of

# NF4: half a byte, a one-byte scale a block of 64, an fp32 scale of those a block of 256.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
_SMALLEST_8BIT = 4096  # entries from which bitsandbytes holds moments in 8 bits
_ZERO_2_BUCKET = 500_000_000  # DeepSpeed's default: gradients that are reduced together
_EIGHT_BIT_BYTES = 2 * (1 + 4 / 256)


@dataclass(frozen=True, slots=True)
class Piece:
    """Tensors of one group that are treated alike.

    Attributes:
        name: of the parameter, or of the linear that factors stand beside.
        group: parameter group.
        size: number of weights.
        learns: whether they get gradients.
        four_bit: whether they are held in NF4.
        matrix: whether autocast casts them (weights of linears and convolutions).
    """

    name: str
    group: str
    size: int
    learns: bool
    four_bit: bool
    matrix: bool


def pieces(model: CogVLMForCausalLM, recipe: Recipe) -> list[Piece]:
    """Every tensor of a run: the model's own, and the factors that `lora` groups add.

    Args:
        model: plain, on the meta device.
        recipe: what learns, what is quantised.
    """
    tune = recipe.tune.groups()
    quantize = recipe.model.quantize.groups if recipe.model.quantize else ()
    held = {f"{name}.weight" for group in quantize for name in linears_of(model, group)}
    found = []
    for name, parameter in model.named_parameters():
        group = group_of(name)
        learns = tune[group].mode == "full"
        matrix = parameter.ndim >= 2 and "embed" not in name
        found.append(Piece(name, group, parameter.numel(), learns, name in held, matrix))
    for group, treatment in recipe.tune.lora().items():
        for name in linears_of(model, group):
            linear = model.get_submodule(name)
            assert isinstance(linear, nn.Linear) and treatment.rank is not None
            wide, high = linear.in_features, linear.out_features
            for size in (treatment.rank * wide, treatment.rank * high):
                found.append(Piece(name, group, size, True, False, True))
            if treatment.variant == "dora":
                found.append(Piece(name, group, high, True, False, False))
    return found


def group_summaries(found: list[Piece], recipe: Recipe) -> list[GroupSummary]:
    """The start-up table's lines, from the pieces."""
    rates = recipe.tune.trainable()
    return [
        GroupSummary(
            group,
            sum(piece.size for piece in found if piece.group == group),
            sum(piece.size for piece in found if piece.group == group and piece.learns),
            recipe.train.learning_rate * rates[group] if group in rates else None,
        )
        for group in GROUPS
    ]


def states(found: list[Piece], recipe: Recipe) -> dict[str, float]:
    """Bytes of what one process holds for the whole run, nothing spread."""
    width = _width(recipe)
    weights = copies = gradients = optimizer = 0.0
    for piece in found:
        if piece.four_bit:
            weights += piece.size * _NF4_BYTES
        elif not piece.learns:
            weights += piece.size * width
        else:
            weights += piece.size * 4
            gradients += piece.size * 4
            # Autocast keeps the bf16 copy of an fp32 matrix from its first use to the backward.
            copies += piece.size * 2 if piece.matrix and width == 2 else 0
            eight = recipe.train.optimizer != "adamw" and piece.size >= _SMALLEST_8BIT
            optimizer += piece.size * (_EIGHT_BIT_BYTES if eight else 8)
    return {
        "weights": weights,
        "bf16 copies": copies,
        "gradients": gradients,
        "optimizer": optimizer,
    }


def spread(
    name: str, whole: Mapping[str, float], found: list[Piece], recipe: Recipe, processes: int
) -> dict[str, float]:
    """The states of one process of many.

    Args:
        name: "DDP", "FSDP2", "ZeRO-2" or "ZeRO-3"; anything else is one process.
        whole: see `states`.
        found: the pieces.
        recipe: of the run.
        processes: how many the work is spread over.

    Returns:
        The parts of `states`, with `buffers`: DDP reduces gradients in flat copies of them; FSDP2
        and ZeRO-3 gather the layers they are in, one running and one coming. In the backward pass
        FSDP2 holds a layer's gradients as they were computed beside the fp32 copy that is reduced,
        after every micro-batch, so that only its own part of them stays.
    """
    width = _width(recipe)
    if name == "DDP":
        return {**whole, "buffers": whole["gradients"]}
    if name == "ZeRO-2":
        return _zero_2(whole, found, width, processes)
    if name not in ("FSDP2", "ZeRO-3"):
        return {**whole, "buffers": 0.0}
    units: dict[str, float] = {}
    learnt: dict[str, float] = {}
    for piece in found:
        unit = _unit(piece.name)
        gathered = 4 if piece.learns and name == "ZeRO-3" else width
        units[unit] = units.get(unit, 0.0) + piece.size * gathered
        reduced = 4 if name == "ZeRO-3" else width + 4
        learnt[unit] = learnt.get(unit, 0.0) + (piece.size * reduced if piece.learns else 0.0)
    sharded = {part: size / processes for part, size in whole.items()}
    sharded["bf16 copies"] = 0.0 if name == "FSDP2" else sharded["bf16 copies"]
    return {**sharded, "buffers": 2 * max(units.values()) + max(learnt.values())}


def _zero_2(
    whole: Mapping[str, float], found: list[Piece], width: int, processes: int
) -> dict[str, float]:
    """All weights in the recipe's dtype on every GPU; fp32 masters and the rest are spread."""
    learnt = sum(piece.size for piece in found if piece.learns)
    masters = 4 * learnt / processes
    return {
        "weights": whole["weights"] - 4 * learnt + (masters if width == 2 else 4 * learnt),
        "bf16 copies": 2 * learnt if width == 2 else 0.0,
        "gradients": whole["gradients"] / processes,
        "optimizer": whole["optimizer"] / processes + (masters if width == 4 else 0.0),
        "buffers": float(width * min(learnt, _ZERO_2_BUCKET)),
    }


def activations(config: CogVLMConfig, recipe: Recipe, tokens: int, rows: float) -> dict[str, float]:
    """Bytes between forward and backward, of one micro-batch.

    Args:
        config: the model.
        recipe: what learns, dtype, checkpointing.
        tokens: of a conversation, its picture among them; all of its text carries loss.
        rows: conversations.

    Returns:
        `activations`, and `logits` (over which their gradient is written).
    """
    width, hidden = _width(recipe), config.hidden_size
    image = min(config.num_image_tokens - 1, tokens)
    text = tokens - image
    tune = recipe.tune.groups()
    heads = config.num_attention_heads
    common = 2 * hidden * width + 8 + (hidden + _query_width(config)) * width + 4 * heads
    layer: float = tokens * common + _kept(config, recipe, text, image, width)
    if recipe.model.attention == "eager":
        layer += 3 * heads * tokens**2 * width
    count = config.num_hidden_layers
    whole: float = (count - 1) * layer + _last_layer(config, recipe, tokens, layer)
    if recipe.train.gradient_checkpointing == "mlp":
        whole = count * (tokens * common + _kept(config, recipe, text, image, width, mlp=False))
        whole += layer
    elif recipe.train.gradient_checkpointing:
        whole = count * tokens * hidden * width + layer
    inner = config.intermediate_size
    moment: float = (
        max(text, image) * (5 * inner + 2 * hidden) * width + tokens * 2 * hidden * width
    )
    kept = whole + _adapter(config, recipe, width) + _tower(config, recipe, width)
    logits = float(text * config.vocab_size * width)
    passing = _passing(config, width) if tune["vision_tower"].mode == "frozen" else 0.0
    unpacked = _unpacked(config, recipe)  # once, however many rows
    total = max(rows * kept + max(rows * moment + unpacked, rows * logits), rows * passing)
    return {"activations": max(0.0, total - rows * logits), "logits": rows * logits}


def _kept(
    config: CogVLMConfig, recipe: Recipe, text: float, image: float, width: int, mlp: bool = True
) -> float:
    """What the linears and SwiGLUs of a layer keep, by expert; attention's alone without `mlp`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query = _query_width(config)
    # Inputs and outputs of QKV, dense, gate, up, down; QKV's, and gate and up's, are read once.
    inputs = (hidden, hidden, hidden, hidden, inner) if mlp else (hidden, hidden)
    outputs = (query, hidden, inner, inner, hidden) if mlp else (query, hidden)
    shared = 3 * hidden + inner if mlp else 2 * hidden
    total = 0.0
    for group, tokens in (("language", text), ("visual_expert", image)):
        treatment = recipe.tune.groups()[group]
        total += tokens * 2 * inner * width * mlp
        if treatment.mode == "full":
            # A plain down projection computes its input a second time.
            total += tokens * (shared - inner * mlp) * width
        elif treatment.mode == "lora":
            total += tokens * _factor_inputs(recipe, group, treatment, shared, sum(inputs), width)
            total += tokens * len(inputs) * (treatment.rank or 0) * width
            if treatment.variant == "dora":
                total += tokens * 2 * sum(outputs) * width
    return total


def _factor_inputs(
    recipe: Recipe, group: str, treatment: GroupTuning, shared: int, own: int, width: int
) -> float:
    """Bytes a token that the factors' inputs take.

    Without dropout linears that read the same rows keep them once; dropout gives each its own copy
    and a mask, and so does the cast to the factors' fp32 that PEFT makes beside 16-bit weights.
    """
    quantize = recipe.model.quantize
    cast = width == 2 and (quantize is None or group not in quantize.groups)
    if treatment.dropout:
        return own * (width + 1.0)
    return float(own * width if cast else shared * width)


def _last_layer(config: CogVLMConfig, recipe: Recipe, tokens: int, layer: float) -> float:
    """The last layer computes what follows its keys at supervised places only."""
    text = tokens - min(config.num_image_tokens - 1, tokens)
    return layer * (0.35 + 0.65 * text / tokens)


def _query_width(config: CogVLMConfig) -> int:
    size = config.hidden_size // config.num_attention_heads
    return config.hidden_size + 2 * config.num_key_value_heads * size


def _unpacked(config: CogVLMConfig, recipe: Recipe) -> float:
    """Full-size matrices that exist for a moment: of 4-bit weights, and of DoRA's product."""
    largest = config.hidden_size * max(config.intermediate_size, _query_width(config))
    dora = any(group.variant == "dora" for group in recipe.tune.lora().values())
    return largest * (_width(recipe) * (recipe.model.quantize is not None) + 12.0 * dora)


def _adapter(config: CogVLMConfig, recipe: Recipe, width: int) -> float:
    """The GLU behind the tower, of one picture; it runs without checkpointing."""
    patches = config.num_image_tokens - 2
    hidden, inner = config.hidden_size, config.intermediate_size
    treatment = recipe.tune.groups()["adapter"]
    per_patch = (3 * hidden + 2 * inner) * width
    if treatment.mode != "frozen":
        # A plain down projection computes its input a second time.
        lora = treatment.mode == "lora"
        per_patch += (config.vision_config.hidden_size + inner * lora) * width
    elif recipe.tune.groups()["vision_tower"].mode == "frozen":
        return patches * hidden * width  # nothing behind it or in it learns
    return patches * per_patch


def _tower(config: CogVLMConfig, recipe: Recipe, width: int) -> float:
    """What a tower that learns keeps, of one picture."""
    if recipe.tune.groups()["vision_tower"].mode == "frozen":
        return 0.0
    vision = config.vision_config
    block = vision.num_positions * (9 * vision.hidden_size + 2 * vision.intermediate_size) * width
    if recipe.train.gradient_checkpointing:
        kept = vision.num_positions * vision.hidden_size * width
        return vision.num_hidden_layers * kept + block
    return vision.num_hidden_layers * block


def _passing(config: CogVLMConfig, width: int) -> float:
    """The widest moment of a frozen tower, of one picture."""
    vision = config.vision_config
    return vision.num_positions * (2 * vision.intermediate_size + 4 * vision.hidden_size) * width


def _width(recipe: Recipe) -> int:
    return 2 if recipe.model.dtype == "bfloat16" else 4


def _unit(name: str) -> str:
    """What is gathered together: a layer of the model or of the tower; the rest by itself."""
    parts = name.split(".")
    at = parts.index("layers") if "layers" in parts else None
    return name if at is None else ".".join(parts[: at + 2])


__all__ = ["Piece", "activations", "group_summaries", "pieces", "spread", "states"]
