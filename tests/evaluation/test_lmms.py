"""The lmms-eval adapter: on its own instances; under lmms-eval itself where that is installed."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
