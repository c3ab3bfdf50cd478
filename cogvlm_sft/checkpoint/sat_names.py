"""What the authors' SAT code calls the tensors of a CogVLM.

Facts of `mixin.py` and `cogvlm_model.py` there, and of the conversion posted in the repository's
issue 241. The gate of the language MLP and both visual experts live in mixins, not in the layers.
"""

import re

# SAT's module names to the released ones; {n} is a layer.
_EVA = "mixins.eva.vit_model."
_MODULES = {
    "transformer.word_embeddings": "model.embed_tokens",
    "transformer.final_layernorm": "model.norm",
    "mixins.lm.lm_head": "lm_head",
    "transformer.layers.{n}.input_layernorm": "model.layers.{n}.input_layernorm",
    "transformer.layers.{n}.post_attention_layernorm": "model.layers.{n}.post_attention_layernorm",
    "transformer.layers.{n}.attention.query_key_value": (
        "model.layers.{n}.self_attn.language_expert_query_key_value"
    ),
    "transformer.layers.{n}.attention.dense": "model.layers.{n}.self_attn.language_expert_dense",
    "transformer.layers.{n}.mlp.dense_h_to_4h": "model.layers.{n}.mlp.language_mlp.up_proj",
    "transformer.layers.{n}.mlp.dense_4h_to_h": "model.layers.{n}.mlp.language_mlp.down_proj",
    "mixins.mlp.gate_proj.{n}": "model.layers.{n}.mlp.language_mlp.gate_proj",
    "mixins.mlp.vision_dense_h_to_4h_list.{n}": "model.layers.{n}.mlp.vision_mlp.up_proj",
    "mixins.mlp.vision_dense_4h_to_h_list.{n}": "model.layers.{n}.mlp.vision_mlp.down_proj",
    "mixins.mlp.vision_gate_proj.{n}": "model.layers.{n}.mlp.vision_mlp.gate_proj",
    "mixins.rotary.vision_query_key_value_list.{n}": (
        "model.layers.{n}.self_attn.vision_expert_query_key_value"
    ),
    "mixins.rotary.vision_dense_list.{n}": "model.layers.{n}.self_attn.vision_expert_dense",
    f"{_EVA}mixins.patch_embedding.proj": "model.vision.patch_embedding.proj",
    f"{_EVA}transformer.position_embeddings": "model.vision.patch_embedding.position_embedding",
    **{
        f"{_EVA}transformer.layers.{{n}}.{theirs}": f"model.vision.transformer.layers.{{n}}.{ours}"
        for theirs, ours in (
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
            ("attention.query_key_value", "attention.query_key_value"),
            ("attention.dense", "attention.dense"),
            ("mlp.dense_h_to_4h", "mlp.fc1"),
            ("mlp.dense_4h_to_h", "mlp.fc2"),
        )
    },
    **{
        f"mixins.eva.linear_proj.{part}": f"model.vision.linear_proj.{part}"
        for part in ("linear_proj", "norm1", "dense_h_to_4h", "gate_proj", "dense_4h_to_h")
    },
}
# Parameters that belong to no module of the table.
_SINGLE = {
    "mixins.eva.boi": "model.vision.boi",
    "mixins.eva.eoi": "model.vision.eoi",
    f"{_EVA}transformer.word_embeddings.weight": "model.vision.patch_embedding.cls_embedding",
}
COMPUTED = re.compile(r"(.*\.)?rotary_emb\.inv_freq")
_PART = re.compile(r"(?P<module>.+?)\.(?P<kind>original\.weight|original\.bias|weight|bias)")
LORA = re.compile(r"(?P<module>.+)\.matrix_[AB]\.\d+")


def released_name(name: str) -> str | None:
    """The released name of one of SAT's tensors; None where a CogVLM has none of that name.

    `original.weight`, the weight beside LoRA matrices, is the weight.
    """
    if name in _SINGLE:
        return _SINGLE[name]
    match = _PART.fullmatch(name)
    if match is None:
        return None
    kind = match["kind"].removeprefix("original.")
    module = match["module"]
    layer = re.search(r"(?<=\.)\d+(?=\.|$)", module)
    table = module if layer is None else f"{module[: layer.start()]}{{n}}{module[layer.end() :]}"
    ours = _MODULES.get(table)
    return None if ours is None else f"{ours.format(n=layer[0] if layer else '')}.{kind}"
