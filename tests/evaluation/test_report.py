"""The page of several tasks: published figures beside ours, and readable on a telephone."""

from pathlib import Path
from typing import Any

import pytest

from cogvlm_sft.evaluation.report import page as html_of
from cogvlm_sft.evaluation.report import write_report
from cogvlm_sft.evaluation.run import evaluate_model
from cogvlm_sft.model import CogVLMForCausalLM, CogVLMProcessor

from .official_files import make


@pytest.fixture
def reports(tiny: tuple[CogVLMForCausalLM, CogVLMProcessor], tmp_path: Path) -> list[Any]:
    found = []
    for task in ("refcoco", "pope", "mm_vet"):
        folder = tmp_path / task
        folder.mkdir()
        found.append(evaluate_model(*tiny, task, *make(task, folder), output=folder / "out"))
    return found


def test_the_published_figure_stands_beside_ours(reports: list[Any]) -> None:
    ours = {figure["name"]: figure["value"] for figure in reports[0]["figures"]}
    row = (
        f"<td>accuracy, val</td><td class=number>{ours['accuracy, val']:.2f}</td>"
        "<td class=number>92.76</td><td>cogvlm-grounding-generalist-v1.1</td>"
    )
    assert row in html_of(reports)
    # A part that these files do not hold has a published figure alone.
    assert "<td>accuracy, testB</td><td class=number></td>" in html_of(reports)


def test_bars_are_for_shares_and_text_is_counted_in_windows(
    tiny: tuple[CogVLMForCausalLM, CogVLMProcessor], tmp_path: Path
) -> None:
    (tmp_path / "plain.txt").write_text("What digit is this?")
    page = html_of([evaluate_model(*tiny, "text_perplexity", [tmp_path / "plain.txt"])])
    assert page.count("<div class=bar>") == 1  # of the tokens predicted first
    assert "<p class=under>1 window</p>" in page
    (tmp_path / "nocaps").mkdir()
    page = html_of([evaluate_model(*tiny, "nocaps", *make("nocaps", tmp_path / "nocaps"))])
    assert "<p class=under>2 questions</p>" in page
    row = page[page.index("<td>CIDEr</td>") :]
    assert "class=bar" not in row[: row.index("</tr>")]


def test_a_page_of_several_tasks_fits_a_telephone(
    page: Any, reports: list[Any], tmp_path: Path
) -> None:
    write_report(tmp_path / "all", reports)
    page.goto((tmp_path / "all/report.html").as_uri())
    assert page.locator("a").all_inner_texts() == [report["title"] for report in reports]
    assert page.locator("details").first.get_attribute("open") is None
    assert page.get_by_role("cell", name="no score").count() == 1
    page.locator("summary").first.click()
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    page.goto((tmp_path / "refcoco/out/report.html").as_uri())
    assert page.locator("details[open]").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") == 390
