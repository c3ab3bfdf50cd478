"""Names, sizes, initialisation, and equality of the ways to compute the same thing."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cogvlm_sft.errors import CheckpointError, ModelInputError
from cogvlm_sft.model import CogVLMConfig, CogVLMForCausalLM
from cogvlm_sft.model.modeling_cogvlm import CogVLMRMSNorm
from cogvlm_sft.model.token_layout import Routing


def released_names(layers: int, vision_layers: int) -> set[str]:
    """Parameter names of cogvlm-chat-hf."""
    vision = "model.vision"
    names = {
        "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
        f"{vision}.boi", f"{vision}.eoi", f"{vision}.patch_embedding.cls_embedding",
        f"{vision}.patch_embedding.position_embedding.weight",
        f"{vision}.patch_embedding.proj.weight", f"{vision}.patch_embedding.proj.bias",
        f"{vision}.linear_proj.norm1.weight", f"{vision}.linear_proj.norm1.bias",
    }  # fmt: skip
    for part in ("linear_proj", "gate_proj", "dense_h_to_4h", "dense_4h_to_h"):
        names.add(f"{vision}.linear_proj.{part}.weight")
    for index in range(vision_layers):
        layer = f"{vision}.transformer.layers.{index}"
        for part in (
            "input_layernorm", "post_attention_layernorm", "attention.query_key_value",
            "attention.dense", "mlp.fc1", "mlp.fc2",
        ):  # fmt: skip
            names |= {f"{layer}.{part}.weight", f"{layer}.{part}.bias"}
    for index in range(layers):
        layer = f"model.layers.{index}"
        names |= {f"{layer}.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm")}
        for expert in ("language", "vision"):
            for part in ("query_key_value", "dense"):
                names.add(f"{layer}.self_attn.{expert}_expert_{part}.weight")
            for part in ("gate_proj", "up_proj", "down_proj"):
                names.add(f"{layer}.mlp.{expert}_mlp.{part}.weight")
    return names


def test_default_is_cogvlm_17b():
    with torch.device("meta"):
        model = CogVLMForCausalLM(CogVLMConfig())
    assert sum(p.numel() for p in model.parameters()) == 17_639_685_376
    names = released_names(32, 63)
    assert {name for name, _ in model.named_parameters()} == names
    assert len(names) == 1155
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(32)}
    assert set(model.state_dict()) == names | buffers
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    layer = "model.layers.0."
    assert shapes[f"{layer}self_attn.vision_expert_query_key_value.weight"] == (12288, 4096)
    assert shapes["model.vision.patch_embedding.position_embedding.weight"] == (1226, 1792)
    assert model.config.num_image_tokens == 1227


def test_default_cogvlm2_size():
    vision = {"image_size": 1344, "num_positions": 9217}
    config = CogVLMConfig(
        vocab_size=128256, intermediate_size=14336, max_position_embeddings=8192,
        num_multi_query_heads=8, pad_token_id=128002, bos_token_id=128000,
        eos_token_id=[128001, 128009], vision_config=vision,
    )  # fmt: skip
    with torch.device("meta"):
        model = CogVLMForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == 19_503_105_280
    assert config.num_image_tokens == 2306 and config.rope_base == 500000.0
    assert CogVLMConfig(**config.to_dict()).to_dict() == config.to_dict()


def test_auto_classes(golden, tmp_path):
    CogVLMConfig.from_pretrained(golden).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is CogVLMConfig
    assert type(AutoModelForCausalLM.from_config(config)) is CogVLMForCausalLM


def test_text_only_is_llama(small_config, make_batch):
    for tied in (False, True):
        config = small_config(tie_word_embeddings=tied, rope_theta=5000.0)
        ours = CogVLMForCausalLM(config).eval()
        llama_config = LlamaConfig(
            vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, rms_norm_eps=config.rms_norm_eps, pad_token_id=0,
            tie_word_embeddings=tied,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        )  # fmt: skip
        llama = LlamaForCausalLM(llama_config).eval()
        weights = {}
        for name, tensor in ours.state_dict().items():
            if "vision" in name or "inv_freq" in name:
                continue
            name = name.replace("mlp.language_mlp", "mlp")
            if "query_key_value" in name:
                for part, letter in zip(tensor.chunk(3), "qkv", strict=True):
                    key = name.replace("language_expert_query_key_value", f"{letter}_proj")
                    weights[key] = part
            else:
                weights[name.replace("language_expert_dense", "o_proj")] = tensor
        llama.load_state_dict(weights, strict=True)
        batch = make_batch(config, ["9", "5"])
        types = batch.pop("token_type_ids")
        expected = llama(**batch).logits
        real = batch["attention_mask"].bool()
        for extra in ({}, {"token_type_ids": types}):
            logits = ours(**batch, **extra).logits
            torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=0)
        assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied


def test_rms_norm_multiplies_before_the_downcast():
    norm = CogVLMRMSNorm(64, 1e-5).to(torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    wide = x.double()
    exact = norm.weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(norm(x), exact.to(torch.bfloat16))


@pytest.mark.parametrize("second_generation", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_oracle(small_config, make_batch, oracle, second_generation, side):
    """Both generations, on rows with 0, 1 and 2 images, against the slow implementation."""
    config = small_config(num_multi_query_heads=2 if second_generation else None)
    model = CogVLMForCausalLM(config).eval()
    batch = make_batch(config, ["i3", "4", "2i3i2", "1i"], side)
    expected = oracle.logits(dict(model.state_dict()), config, **batch)
    real = batch["attention_mask"].bool()
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        logits = model(**batch).logits
        torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=0)
    labels = batch["input_ids"].masked_fill(~real | (batch["token_type_ids"] == 1), -100)
    # A label inside an image block makes a visual-expert row supervised.
    labels[0, real[0].long().argmax() + 3] = 7
    weights = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters()}
    logits = oracle.logits(weights, config, **batch)
    shifted = labels[:, 1:].masked_fill(~real[:, :-1], -100)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), shifted.flatten())
    loss.backward()
    for options in ({}, {"supervised_only": True}):
        model.zero_grad()
        output = model(**batch, labels=labels, **options)
        torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=0)
        output.loss.backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                parameter.grad, _reference(weights, name), atol=1e-5, rtol=1e-4, msg=name
            )


def _reference(weights: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    gradient = weights[name].grad
    if name == "model.embed_tokens.weight":
        gradient = gradient.clone()
        gradient[0] = 0  # the pad row is frozen, as in the released code
    return gradient


def test_num_items_in_batch_scales_the_sum(model, cases):
    inside = cases["batch2_right"]["in"]
    batch = {k: inside[k] for k in ("input_ids", "token_type_ids", "pixel_values", "labels")}
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    mean = model(**batch).loss
    for options in ({}, {"supervised_only": True}):
        for items in (2 * supervised, torch.tensor(2 * supervised)):
            half = model(**batch, num_items_in_batch=items, **options).loss
            torch.testing.assert_close(half * 2, mean)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model, cases, reentrant):
    inside = cases["two_images_interleaved"]["in"]
    batch = {k: inside[k] for k in ("input_ids", "token_type_ids", "pixel_values", "labels")}
    model.train()
    expected = copy.deepcopy(model)
    expected(**batch).loss.backward()
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for options in ({}, {"supervised_only": True}):
        model.zero_grad()
        model(**batch, **options).loss.backward()
        for (name, left), right in zip(
            model.named_parameters(), expected.parameters(), strict=True
        ):
            torch.testing.assert_close(left.grad, right.grad, atol=1e-6, rtol=1e-5, msg=name)


def test_frozen_tower_runs_without_autograd_and_once(model, cases):
    inside = cases["single_image"]["in"]
    batch = {k: inside[k] for k in ("input_ids", "token_type_ids", "pixel_values", "labels")}
    tower = (model.model.vision.patch_embedding, model.model.vision.transformer)
    for part in tower:
        part.requires_grad_(False)
    calls = []
    model.model.vision.transformer.layers[0].mlp.register_forward_hook(
        lambda module, inputs, output: calls.append(output.requires_grad)
    )
    model.train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    model(**batch).loss.backward()
    assert calls == [False]
    for part in tower:
        assert all(p.grad is None for p in part.parameters())
    assert model.model.vision.linear_proj.linear_proj.weight.grad.norm() > 0
    # Trainable again, it is checkpointed: once forward, once recomputed.
    for part in tower:
        part.requires_grad_(True)
    calls.clear()
    model(**batch).loss.backward()
    assert calls == [True, True]


def test_frozen_tower_rests_without_images(model):
    model.model.vision.patch_embedding.requires_grad_(False)
    calls = []
    model.model.vision.transformer.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([[1, 5, 6, 7]])
    model(input_ids=ids)
    assert len(calls) == 1  # its layers still train
    model.model.vision.transformer.requires_grad_(False)
    model(input_ids=ids)
    assert len(calls) == 1


def test_missing_weights_are_initialised(golden, tmp_path):
    weights = load_file(golden / "model.safetensors")
    dropped = {n for n in weights if "inv_freq" in n}
    dropped |= {"model.vision.boi", "model.layers.1.mlp.vision_mlp.up_proj.weight"}
    dropped |= {"model.layers.0.input_layernorm.weight"}
    save_file(
        {n: t for n, t in weights.items() if n not in dropped},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )
    (tmp_path / "config.json").write_text((golden / "config.json").read_text())
    model, report = CogVLMForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == {n for n in dropped if "inv_freq" not in n}
    state = model.state_dict()
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    torch.testing.assert_close(state[name], weights[name])
    assert torch.equal(state["model.layers.0.input_layernorm.weight"], torch.ones(64))
    for name in ("model.vision.boi", "model.layers.1.mlp.vision_mlp.up_proj.weight"):
        assert 0.01 < state[name].std().item() < 0.03


def test_initialisation_from_scratch(small_config):
    state = CogVLMForCausalLM(small_config(initializer_range=0.05)).state_dict()
    for name, tensor in state.items():
        if "norm" in name:
            assert torch.equal(tensor, torch.full_like(tensor, float(name.endswith("weight"))))
        elif name.endswith("bias"):
            assert not tensor.any()
        elif "position_embedding" in name:
            # As wide as the patches it is added to: 3 x 14 x 14 inputs of unit variance.
            assert 0.9 < tensor.std().item() / (0.05 * 588**0.5) < 1.1
        elif "inv_freq" not in name:
            assert 0.03 < tensor.std().item() < 0.07, name
    assert not state["model.embed_tokens.weight"][0].any()


def test_pad_that_is_eos_still_learns(small_config):
    config = small_config(pad_token_id=2, eos_token_id=2)
    assert CogVLMForCausalLM(config).model.embed_tokens.padding_idx is None


def test_hidden_states_and_attentions(model, cases):
    inside = cases["batch2_right"]["in"]
    batch = {k: inside[k] for k in ("input_ids", "token_type_ids", "pixel_values")}
    model.set_attn_implementation("eager")
    output = model(**batch, output_hidden_states=True, output_attentions=True)
    length = batch["input_ids"].shape[1]
    assert [tuple(h.shape) for h in output.hidden_states] == [(2, length, 64)] * 3
    assert [tuple(a.shape) for a in output.attentions] == [(2, 4, length, length)] * 2
    logits = model.lm_head(output.hidden_states[-1])
    assert torch.equal(logits, output.logits)
    assert torch.equal(model(**batch, logits_to_keep=2).logits, output.logits[:, -2:])
    as_tuple = model(**batch, return_dict=False)
    assert torch.equal(as_tuple[0], output.logits)


def test_backbone_keeps_token_order_and_full_length(model, cases):
    """TRL's fused head calls the backbone by itself."""
    inside = cases["mixed_image_text_right"]["in"]
    keys = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")
    batch = {k: inside[k] for k in keys}
    hidden = model.model(**batch, use_cache=False).last_hidden_state
    assert hidden.shape[:2] == batch["input_ids"].shape
    assert torch.equal(model.lm_head(hidden), model(**batch).logits)
    assert model.get_decoder() is model.model
    assert model.get_input_embeddings() is model.model.embed_tokens


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 30}, "num_attention_heads"),
        ({"num_multi_query_heads": 3}, "num_multi_query_heads"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3"),
        ({"vision_config": {"image_size": 224}}, "num_positions"),
        ({"vision_config": {"image_size": 225}}, "patch_size"),
        ({"num_image_tokens": 5}, "num_image_tokens"),
    ],
)
def test_contradictory_configurations(small_config, changes, words):
    with pytest.raises(CheckpointError, match=words):
        small_config(**changes)


def test_images_and_blocks_must_match(small_config, make_batch):
    config = small_config()
    model = CogVLMForCausalLM(config).eval()
    phrase = "Image features and image tokens do not match"
    batch = make_batch(config, ["i3", "i2"])
    pixels = batch["pixel_values"]
    with pytest.raises(ModelInputError, match=rf"{phrase}: 1 images make 18 .* 36 image tokens"):
        model(**{**batch, "pixel_values": pixels[:1]})
    with pytest.raises(ValueError, match=phrase):
        model(**{**batch, "pixel_values": None})
    with pytest.raises(ModelInputError, match=phrase):
        model(input_ids=batch["input_ids"], pixel_values=pixels)
    touching = make_batch(config, ["ii3"])
    with pytest.raises(ModelInputError, match="between two blocks"):
        model(**touching)
    cut = {k: v[:, :12] if v.dim() == 2 else v for k, v in batch.items()}
    with pytest.raises(ModelInputError, match=phrase):
        model(**cut)
    hidden = {**batch, "attention_mask": (batch["input_ids"] != 0).long()}
    with pytest.raises(ModelInputError, match="attention_mask hides 36"):
        model(**hidden)
    with pytest.raises(ModelInputError, match=r"\(images, 3, 56, 56\)"):
        model(**{**batch, "pixel_values": torch.zeros(2, 3, 28, 28)})
    with pytest.raises(ModelInputError, match="needs labels"):
        model(**batch, supervised_only=True)


def test_rows_come_back_on_another_device_than_the_batch():
    """As with `device_map="auto"`, where the last layer is not on the first one's device."""
    routing = Routing(1, 3, 1, torch.tensor([2, 0, 1]))
    assert routing.scatter(torch.empty(3, 4, device="meta")).device.type == "meta"


def test_decoding_needs_the_whole_sequence_of_types(small_config, make_batch):
    config = small_config()
    model = CogVLMForCausalLM(config).eval()
    batch = make_batch(config, ["i3"])
    whole = model(**batch).logits
    cache = model(**{k: v[:, :-1] if v.dim() == 2 else v for k, v in batch.items()}, use_cache=True)
    step = {"input_ids": batch["input_ids"][:, -1:], "past_key_values": cache.past_key_values}
    with pytest.raises(ModelInputError, match="token_type_ids cover 0 tokens"):
        model(**step)
    logits = model(**step, token_type_ids=batch["token_type_ids"]).logits
    torch.testing.assert_close(logits[:, -1], whole[:, -1], atol=1e-5, rtol=0)
