"""The preview shows each token, its position, and what is to be predicted there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogvlm_sft import CogVLMConfig, DataError, Turn
from cogvlm_sft.cli import main
from cogvlm_sft.conversation import Conversation
from cogvlm_sft.data.encode import encode_conversation
from cogvlm_sft.data.preview import encode_chosen, render_row, render_text
from cogvlm_sft.model import CogVLMProcessor

EXPECTED = """
      place   position      id  token                     learns to predict
          0          0       1  '<s>'
        1-6        1-3          [red.png]
          7          4   22478  '▁Question'
          8          5   28747  ':'
          9          6     330  '▁A'
         10          7   28804  '?'
         11          8   26307  '▁Answer'
         12          9   28747  ':'                       '▁Red'
         13         10    3690  '▁Red'                    '</s>'
         14         11      13  '<0x0A>'
         15         12   24994  'Question'
         16         13   28747  ':'
         17         14     365  '▁B'
         18         15   28804  '?'
         19         16   26307  '▁Answer'
         20         17   28747  ':'                       '▁Sure'
         21         18   12875  '▁Sure'                   '</s>'
         22         19       2  '</s>'
23 tokens, 6 of 1 picture(s), 4 with loss
"""


def test_table(processor: CogVLMProcessor) -> None:
    turns = (
        Turn("user", "<image> A?"),
        Turn("assistant", "Red"),
        Turn("user", "B?"),
        Turn("assistant", "Sure"),
    )
    conversation = Conversation("c1", "test", "chat", ("red.png",), turns)
    (row,) = encode_conversation(conversation, processor).parts
    assert render_row(row, processor) == EXPECTED.strip("\n")


@pytest.fixture
def checkpoint(processor: CogVLMProcessor, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    processor.save_pretrained(folder)
    CogVLMConfig(vision_config={"image_size": 28, "num_positions": 5}).save_pretrained(folder)
    return folder


def test_choice_of_conversations(
    write_build: Callable[..., Path],
    about: Callable[..., dict[str, Any]],
    processor: CogVLMProcessor,
) -> None:
    build = write_build(*[about(f"{i}.png", ("A?", f"{i}.")) for i in range(3)])

    def text(**keys: Any) -> str:
        return render_text(encode_chosen(build, processor, **keys), processor)

    assert text().startswith("build:0  source build  style chat\npicture [0.png]  28 x 28 to the")
    assert "[0.png]" in text(limit=2) and "[1.png]" in text(limit=2)
    assert "[2.png]" not in text(limit=2) and "[2.png]" in text(ids=["build:2"])
    with pytest.raises(DataError, match="no conversation with id 'build:9'"):
        text(ids=["build:2", "build:9"])


def test_length_and_loss_of_a_recipe(
    write_build: Callable[..., Path],
    about: Callable[..., dict[str, Any]],
    processor: CogVLMProcessor,
) -> None:
    rounds = [(f"What is number {i}?", f"It is number {i}.") for i in range(3)]
    build = write_build(about("red.png", *rounds))
    whole = render_text(encode_chosen(build, processor), processor)
    last = render_text(encode_chosen(build, processor, loss_on="last"), processor)
    assert whole.count("'</s>'") > last.count("'</s>'")
    (cut,) = encode_chosen(build, processor, max_length=40)
    assert len(cut.rows) > 1 and "part 2 of" in render_text([cut], processor)


def test_command_and_page(
    write_build: Callable[..., Path],
    about: Callable[..., dict[str, Any]],
    checkpoint: Path,
    image_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    page: Any,
) -> None:
    build = write_build(about("red.png", ("A <b>?", "Red.")), about("gone.png", ("B?", "No.")))
    html = tmp_path / "preview.html"
    command = ["data", "preview", str(build), "--checkpoint", str(checkpoint), "--limit", "2",
               "--images", str(image_root), "--html", str(html)]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "picture [red.png]  20 x 10 on disk, 28 x 28 to the model, 6 tokens" in printed
    assert "image 'gone.png' is missing" in printed
    page.goto(html.as_uri())
    picture = page.locator("img")
    assert picture.count() == 1
    colour = picture.evaluate(
        "i => { const c = document.createElement('canvas'); c.width = c.height = 28;"
        " const x = c.getContext('2d'); x.drawImage(i, 0, 0);"
        " return [i.naturalWidth, ...x.getImageData(14, 14, 1, 1).data]; }"
    )
    assert colour == [28, 255, 0, 0, 255]  # the model's square, in the picture's colour
    learnt = page.locator(".row").first.locator(".learn b").all_inner_texts()
    assert learnt == ["▁Red", ".", "</s>"]
    assert page.locator(".row b b, .t > b").count() == 0  # foreign markup stays text


def test_command_by_recipe(
    write_build: Callable[..., Path],
    about: Callable[..., dict[str, Any]],
    checkpoint: Path,
    image_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    build = write_build(about("red.png", ("A?", "Red."), ("B?", "Blue.")))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{checkpoint: {checkpoint}}}\n"
        f"data: {{train: [{{path: {build}}}], image_root: {image_root}, loss_on: last}}\n"
        f"train: {{output: {tmp_path}/run, iterations: 1, global_batch_size: 1, "
        "learning_rate: 1e-3}\n"
    )
    assert main(["data", "preview", str(build), "--recipe", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "20 x 10 on disk" in printed and "3 with loss" in printed
    assert main(["data", "preview", str(build), "--recipe", "nothing.yaml"]) == 2
