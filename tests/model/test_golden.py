"""The released code's figures, through the public API."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from cogvlm_sft.model import CogVLMForCausalLM
from cogvlm_sft.model.modeling_cogvlm import build_position_ids, build_vision_expert_mask

FORWARD = [
    "single_image", "batch2_right", "batch2_left", "text_only", "mixed_image_text_right",
    "two_images_interleaved", "image_last",
]  # fmt: skip
INPUTS = ("input_ids", "token_type_ids", "attention_mask", "pixel_values", "labels")


def inputs_of(case: dict, *, labels: bool = True) -> dict:
    keys = INPUTS if labels else INPUTS[:-1]
    return {key: case["in"][key] for key in keys if key in case["in"]}


@pytest.mark.parametrize("name", FORWARD)
def test_experts_and_positions(cases, name):
    inside = cases[name]["in"]
    types, mask = inside["token_type_ids"], inside["attention_mask"]
    assert torch.equal(build_vision_expert_mask(types), inside["vision_expert_mask"].bool())
    assert torch.equal(build_position_ids(types, mask), inside["position_ids"])


@pytest.mark.parametrize("name", FORWARD)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits(model, cases, name, attention):
    model.set_attn_implementation(attention)
    case = cases[name]
    logits = model(**inputs_of(case, labels=False)).logits[..., ::8]
    real = case["in"]["attention_mask"].bool()
    torch.testing.assert_close(logits[real], case["out"]["logits"][real], atol=1e-4, rtol=0)


@pytest.mark.parametrize("supervised_only", [False, True])
@pytest.mark.parametrize("name", FORWARD[:-1])
def test_loss_and_gradients(model, cases, figures, name, supervised_only):
    expected = figures["cases"][name]
    output = model(**inputs_of(cases[name]), supervised_only=supervised_only)
    assert abs(output.loss.item() - expected["loss"]) <= 1e-5
    assert (output.logits is None) == supervised_only
    output.loss.backward()
    assert {n for n, _ in model.named_parameters()} == set(expected["grad_norm"])
    for parameter_name, parameter in model.named_parameters():
        # A module without a token takes part with zeros: AdamW and sharded ranks need them.
        assert parameter.grad is not None, parameter_name
        norm = expected["grad_norm"][parameter_name] or 0.0  # null: none without a picture
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=0), parameter_name


@pytest.mark.parametrize("supervised_only", [False, True])
def test_five_optimizer_steps(model, cases, figures, supervised_only):
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05
    )
    losses = []
    for _ in range(5):
        loss = model(**inputs_of(cases["batch2_right"]), supervised_only=supervised_only).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    expected = figures["train5"]
    assert losses == pytest.approx(expected["losses"], abs=1e-4)
    norm = torch.stack([p.detach().norm() for p in model.parameters()]).norm().item()
    assert norm == pytest.approx(expected["param_norm_after"], rel=1e-5)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("name", ["gen_single", "gen_batch_left", "gen_text"])
def test_greedy_tokens(model, cases, name, use_cache):
    case = cases[name]
    count = case["out"]["new_tokens"].shape[1]
    output = model.generate(
        **inputs_of(case),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        use_cache=use_cache,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(output.sequences[:, -count:], case["out"]["new_tokens"])
    logits = torch.stack(output.logits, dim=1)[..., ::8]
    torch.testing.assert_close(logits, case["out"]["step_logits"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["batch2_right", "batch2_left", "mixed_image_text_right"])
def test_batch_equals_single(model, cases, name):
    inputs = inputs_of(cases[name], labels=False)
    batched = model(**inputs).logits
    for row in range(2):
        real = inputs["attention_mask"][row].bool()
        alone = {k: inputs[k][row : row + 1, real] for k in ("input_ids", "token_type_ids")}
        if alone["token_type_ids"].any():
            alone["pixel_values"] = inputs["pixel_values"][row : row + 1]
        single = model(**alone).logits[0]
        torch.testing.assert_close(batched[row, real], single, atol=1e-5, rtol=0)


def test_layout_round_trip(golden, tmp_path):
    model, report = CogVLMForCausalLM.from_pretrained(golden, output_loading_info=True)
    assert not any(report.values()), report
    model.save_pretrained(tmp_path)
    before, after = (load_file(d / "model.safetensors") for d in (golden, tmp_path))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes(), name


def test_released_config_has_no_model_type(golden, tmp_path, cases):
    """Nor the keys that transformers adds; rotary buffers may be missing too."""
    shutil.copy(golden / "model.safetensors", tmp_path)
    config = json.loads((golden / "config.json").read_text())
    kept = {k: v for k, v in config.items() if k not in ("model_type", "dtype")}
    kept |= {"auto_map": {"AutoConfig": "configuration_cogvlm.CogVLMConfig"}}
    kept |= {"torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    model = CogVLMForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.dtype == torch.float32
    case = cases["image_last"]
    logits = model(**inputs_of(case, labels=False)).logits[..., ::8]
    torch.testing.assert_close(logits, case["out"]["logits"], atol=1e-4, rtol=0)
    assert CogVLMForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["model_type"] == "cogvlm" and "auto_map" not in saved
    # Engines take the presence of these keys for CogVLM2.
    assert "rope_theta" not in saved
    assert ("num_multi_query_heads" in saved) == ("num_multi_query_heads" in config)
    assert saved["vision_config"]["num_positions"] == 17
