"""The lmms-eval adapter: on its own instances; under lmms-eval itself where that is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy
import pytest
from PIL import Image

from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation import lmms
from cogvlm_sft.evaluation.generate import Request, generate_answers
from cogvlm_sft.evaluation.lmms import CogVLMSFT, cut_at
from cogvlm_sft.model import CogVLMForCausalLM, CogVLMProcessor

Tiny = tuple[CogVLMForCausalLM, CogVLMProcessor]


def _picture(seed: int) -> Image.Image:
    pixels = numpy.random.default_rng(seed).integers(0, 256, (30, 30, 3), dtype=numpy.uint8)
    return Image.fromarray(pixels)


def _adapter(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> CogVLMSFT:
    monkeypatch.setattr(lmms, "_INSTALLED", True)
    return CogVLMSFT(str(checkpoint), style="vqa", batch_size="2")


def _shown(document: dict[str, Any]) -> list[Image.Image]:
    return [document["picture"]]


def test_instances_are_answered_as_the_evaluation_answers(
    checkpoint: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = _adapter(checkpoint, monkeypatch)
    documents = [{"picture": _picture(n)} for n in range(4)]
    adapter.task_dict = {"vqa": {"val": documents}}
    asked = ["<image>What digit is this?", "7?", "Where is it?", "What digit is this?"]
    instances = [
        SimpleNamespace(
            args=(text, {"max_new_tokens": 4 + n % 2}, _shown, n, "vqa", "val")
        )
        for n, text in enumerate(asked)
    ]  # fmt: skip
    expected = []
    for n, text in enumerate(asked):
        request = Request((documents[n]["picture"],), text.removeprefix("<image>"), "vqa")
        expected += generate_answers(*tiny, [request], max_new_tokens=4 + n % 2)
    assert adapter.generate_until(instances) == expected
    with pytest.raises(DataError, match="generation tasks only"):
        adapter.loglikelihood(instances)


def test_several_pictures_are_numbered_and_other_visuals_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = _adapter(checkpoint, monkeypatch)
    adapter.task_dict = {"t": {"s": [{}]}}
    two: Any = [_picture(1), _picture(2)]
    request = adapter._request("Same?", {}, lambda _: two, 0, "t", "s")
    assert request.question == "Picture 1: <image> Picture 2: <image> Same?"
    assert adapter._request("7?", {}, lambda _: [], 0, "t", "s").style == "text"
    with pytest.raises(DataError, match="shows a str"):
        adapter._request("7?", {}, lambda _: ["film.mp4"], 0, "t", "s")


def test_answers_are_cut_at_the_first_ending() -> None:
    assert cut_at("yes\n\nno", ["\n\n", "e"]) == "y"
    assert cut_at(" yes ", ["", "x"]) == "yes"
    assert cut_at("a b", "b") == "a"


def test_without_the_package_the_install_line_is_said(checkpoint: Path) -> None:
    if lmms._INSTALLED:
        pytest.skip("lmms-eval is installed here")
    with pytest.raises(DataError, match="pip install"):
        CogVLMSFT(str(checkpoint))


def test_lmms_eval_finds_the_model_by_its_entry_point() -> None:
    registry = pytest.importorskip("lmms_eval.models.registry_v2", reason="needs the extra `eval`")
    found = registry.ModelRegistryV2()
    found.register_manifest(lmms.manifest())
    assert "cogvlm_sft" in found.list_model_names()


TASK = """
task: colours_local
dataset_path: parquet
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_visual: !function shown.visual
doc_to_text: !function shown.text
doc_to_target: answer
generation_kwargs: {max_new_tokens: 4, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
SHOWN = """
def visual(row):
    return [row["image"].convert("RGB")]

def text(row, lmms_eval_specific_kwargs=None):
    return row["question"]
"""


@pytest.mark.slow
def test_two_processes_of_lmms_eval_score_what_we_score(
    checkpoint: Path, tiny: Tiny, tmp_path: Path
) -> None:
    pytest.importorskip("lmms_eval.__main__", reason="needs the extra `eval`")
    pictures = [_picture(n) for n in range(6)]
    asked = [f"What digit is this, {n}?" for n in range(6)]
    said = generate_answers(
        *tiny, [Request((p,), q, "vqa") for p, q in zip(pictures, asked, strict=True)],
        max_new_tokens=4,
    )  # fmt: skip
    answers = [*said[:4], "wrong", "wrong"]
    rows = datasets.Dataset.from_dict({"image": pictures, "question": asked, "answer": answers})
    rows.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "colours.yaml").write_text(TASK.replace("FILE", str(tmp_path / "rows.parquet")))
    (tmp_path / "shown.py").write_text(SHOWN)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "lmms_eval", "--model", "cogvlm_sft",
         "--model_args", f"checkpoint={checkpoint},style=vqa", "--tasks", "colours_local",
         "--include_path", str(tmp_path), "--batch_size", "2",
         "--output_path", str(tmp_path / "o")],
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_OFFLINE": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    found = [json.loads(file.read_text()) for file in (tmp_path / "o").rglob("*results.json")]
    assert found, done.stderr[-2000:]
    assert found[0]["results"]["colours_local"]["exact_match,none"] == pytest.approx(4 / 6)
