"""Checkpoints in 4 bits: which linears, that they answer, and that the report says so."""

from pathlib import Path

import pytest

from cogvlm_sft.cli import main
from cogvlm_sft.errors import CheckpointError
from cogvlm_sft.evaluation.loading import describe_weights, open_model
from cogvlm_sft.evaluation.run import evaluate_checkpoint
from cogvlm_sft.tune.naming import linears_of

from .official_files import make


def test_both_experts_are_held_in_4_bits_and_nothing_else(checkpoint: Path) -> None:
    model = open_model(checkpoint, quantize="nf4")
    held = {
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters()
        if type(parameter).__name__ == "Params4bit"
    }
    assert held == {*linears_of(model, "language"), *linears_of(model, "visual_expert")}
    assert describe_weights(model) == f"{len(held)} linears in 4 bits (NF4), the rest in float32"
    assert describe_weights(open_model(checkpoint)) == "float32"


def test_a_score_in_4_bits_says_so_and_is_not_mixed_with_another(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, images = make("exact_match", tmp_path)
    given = [str(checkpoint), "--task", "exact_match", "--annotations", str(files[0]), "--images",
             str(images), "--output", str(tmp_path / "out")]  # fmt: skip
    assert main(["evaluate", *given]) == 0
    assert main(["evaluate", *given, "--quantize", "nf4"]) == 0
    assert "going on" not in capsys.readouterr().err
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert "linears in 4 bits (NF4), the rest in float32" in page
    evaluate_checkpoint(
        checkpoint, "exact_match", files, images, output=tmp_path / "out", quantize="nf4"
    )
    said = capsys.readouterr()
    assert "going on, 4 of 4" in said.err
    assert not said.out  # where a program reads the report


def test_an_adapter_without_its_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="adapter_model"):
        open_model(tmp_path, quantize="nf4")
