"""The preview shows each token, its position, and what is to be predicted there."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cogvlm_sft import CogVLMConfig, DataError, Turn
from cogvlm_sft.conversation import Conversation
from cogvlm_sft.data.encode import encode_conversation
from cogvlm_sft.data.preview import preview, render_row
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


def test_choice_of_conversations(
    write_build: Callable[..., Path],
    about: Callable[..., dict[str, Any]],
    processor: CogVLMProcessor,
    tmp_path: Path,
) -> None:
    checkpoint = tmp_path / "checkpoint"
    processor.save_pretrained(checkpoint)
    CogVLMConfig(vision_config={"image_size": 28, "num_positions": 5}).save_pretrained(checkpoint)
    build = write_build(*[about(f"{i}.png", ("A?", f"{i}.")) for i in range(3)])
    assert preview(build, checkpoint).startswith("build:0  source build  style chat\n")
    two = preview(build, checkpoint, limit=2)
    assert "[0.png]" in two and "[1.png]" in two and "[2.png]" not in two
    assert "[2.png]" in preview(build, checkpoint, ids=["build:2"])
    with pytest.raises(DataError, match="no conversation with id 'build:9'"):
        preview(build, checkpoint, ids=["build:2", "build:9"])
