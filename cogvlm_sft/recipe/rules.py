"""Rules that more than one key of a recipe takes part in: what cannot train, and how to mend it."""

from cogvlm_sft import launch
from cogvlm_sft.errors import RecipeError
from cogvlm_sft.recipe.sections import Recipe


def check_together(recipe: Recipe) -> None:
    """Rules that more than one key takes part in.

    Raises:
        RecipeError: naming the keys, what they are and how to mend them.
    """
    model, train, source = recipe.model, recipe.train, recipe.source
    if (model.checkpoint is None) == (model.config is None):
        found = "neither" if model.checkpoint is None else "both"
        raise RecipeError(
            f"{source}: exactly one of model.checkpoint (weights to start from) and model.config "
            f"(start from scratch) must be given, found {found}"
        )
    if model.config is not None and model.image_size is not None:
        raise RecipeError(
            f"{source}: model.image_size is for weights that are read; with model.config set "
            "model.config.vision_config.image_size and num_positions"
        )
    if model.config is not None and model.tokenizer is None:
        raise RecipeError(
            f"{source}: model.config starts from scratch, so model.tokenizer must name a "
            "tokenizer folder, found null"
        )
    if not recipe.tune.trainable():
        raise RecipeError(
            f"{source}: all five groups under tune are frozen, so nothing would be trained; "
            "set the mode of at least one to full or lora"
        )
    _check_tuning(recipe)
    if train.warmup_iterations > train.iterations:
        raise RecipeError(
            f"{source}: train.warmup_iterations {train.warmup_iterations} exceeds "
            f"train.iterations {train.iterations}"
        )
    evaluate = recipe.evaluate
    if evaluate is not None and evaluate.every is None and (evaluate.prompts or not evaluate.tasks):
        raise RecipeError(
            f"{source}: evaluate.every is null, so nothing would be looked at while training; give "
            "a number of steps, or evaluate.tasks alone"
        )
    if (
        evaluate is not None
        and evaluate.every is not None
        and recipe.data.validation is None
        and not evaluate.prompts
    ):
        raise RecipeError(
            f"{source}: evaluate asks for held-out loss, but data.validation is null; "
            "name a validation file or build, give evaluate.prompts, or leave evaluate out"
        )
    if evaluate is not None and not evaluate.prompts:
        longest = type(evaluate).model_fields["max_new_tokens"].default
        if evaluate.max_new_tokens != longest:
            raise RecipeError(
                f"{source}: evaluate.max_new_tokens is {evaluate.max_new_tokens}, the longest "
                "answer to a prompt, but evaluate.prompts is empty; give prompts, or remove it"
            )
    _check_batches(recipe)
    recipe.accumulation_steps(launch.world_size())


def _check_batches(recipe: Recipe) -> None:
    """Keys that say how conversations are put together.

    Raises:
        RecipeError: naming the keys, what they are and how to mend them.
    """
    data, source = recipe.data, recipe.source
    if data.share_images and data.token_budget is None:
        raise RecipeError(
            f"{source}: data.share_images is true, so micro-batches differ in size, but "
            "data.token_budget is null; set it to the most tokens that fit into memory at once, "
            "for example train.micro_batch_size x data.max_length"
        )
    if data.token_budget is not None and not data.share_images:
        raise RecipeError(
            f"{source}: data.token_budget is {data.token_budget}, but data.share_images is false; "
            "without sharing a micro-batch holds train.micro_batch_size conversations. Remove it"
        )
    if data.share_images and data.length_window > 1:
        raise RecipeError(
            f"{source}: data.length_window is {data.length_window}, but data.share_images puts "
            "conversations together by picture; remove one of the two"
        )


def _check_tuning(recipe: Recipe) -> None:
    """Combinations of groups, modes and 4-bit weights that cannot train, with the reason.

    Raises:
        RecipeError: naming the keys, what they are and how to mend them.
    """
    model, tune, source = recipe.model, recipe.tune, recipe.source
    for name, group in tune.groups().items():
        key, alone = f"{source}: tune.{name}", f"'tune.{name}={{mode: {group.mode}}}'"
        if group.mode == "frozen" and group.rate is not None:
            raise RecipeError(
                f"{key}.rate is {group.rate:g}, but tune.{name}.mode is frozen, so nothing would "
                f"learn at it; remove the rate, or set the mode to full or lora ({alone} on the "
                "command line takes the place of all keys of the group)"
            )
        for option in ("rank", "alpha", "dropout", "variant"):
            if group.mode != "lora" and getattr(group, option) is not None:
                raise RecipeError(
                    f"{key}.{option} is {getattr(group, option)!r}, but tune.{name}.mode is "
                    f"{group.mode}; {option} belongs to mode lora: remove it, or set the mode "
                    f"({alone} on the command line takes the place of all keys of the group)"
                )
    lora = tune.lora()
    if "embeddings" in lora:
        raise RecipeError(
            f"{source}: tune.embeddings.mode is lora; low-rank factors are for linears inside the "
            "layers (TRL and the engines that serve CogVLM read lm_head as one plain matrix). "
            "Use full or frozen"
        )
    if lora and model.config is not None:
        raise RecipeError(
            f"{source}: tune.{next(iter(lora))}.mode is lora, but model.config starts from random "
            "weights, which an adapter does not hold; start from model.checkpoint, or use full"
        )
    variants = {group.variant for group in lora.values()}
    if "dora" in variants and len(variants) > 1:
        raise RecipeError(
            f"{source}: tune has the variant dora in one group and "
            f"{', '.join(sorted(str(v) for v in variants - {'dora'}))} in another; PEFT's adapter "
            "file says for all its linears at once whether they are DoRA. Use dora in all or none"
        )
    if model.quantize is None:
        return
    if model.config is not None:
        raise RecipeError(
            f"{source}: model.quantize is set, but model.config starts from random weights; 4-bit "
            "weights stay frozen, so they would never learn. Start from model.checkpoint"
        )
    for name in model.quantize.groups:
        group = tune.groups()[name]
        if group.mode == "full":
            raise RecipeError(
                f"{source}: tune.{name}.mode is full, but model.quantize holds the group's weights "
                f"in 4 bits, which take no gradient. Use lora or frozen, or leave {name} out of "
                "model.quantize.groups"
            )
        if group.variant == "pissa":
            raise RecipeError(
                f"{source}: tune.{name}.variant is pissa, which moves part of each weight into the "
                "factors, but model.quantize holds the weights in 4 bits, which cannot be changed. "
                "Use lora, rslora or dora"
            )
