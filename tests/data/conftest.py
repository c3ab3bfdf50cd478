"""A processor with a real tokenizer of LLaMA's kind, pictures on disk, conversation files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import numpy as np
import pytest
from PIL import Image
from transformers import LlamaTokenizer

from cogvlm_sft.model import CogVLMImageProcessor, CogVLMProcessor

WriteBuild = Callable[..., Path]


@pytest.fixture(scope="session")
def processor(tmp_path_factory: pytest.TempPathFactory) -> CogVLMProcessor:
    """A picture of 28 px takes 6 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    carried = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    shutil.copy(carried, folder / "tokenizer.model")
    return CogVLMProcessor(CogVLMImageProcessor(size=28), LlamaTokenizer.from_pretrained(folder))


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """Three pictures; `large.jpg` is too large to be decoded by the check before training."""
    root = tmp_path / "images"
    root.mkdir()
    Image.new("RGB", (20, 10), "red").save(root / "red.png")
    Image.new("RGB", (10, 20), "blue").save(root / "blue.png")
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3)).astype(np.uint8)
    Image.fromarray(noise).save(root / "large.jpg", quality=95)
    assert (root / "large.jpg").stat().st_size > 100_000
    return root


@pytest.fixture
def write_build(tmp_path: Path) -> WriteBuild:
    """Writes records as a build folder; a record is given by its questions, answers and images."""

    def write(*records: dict[str, Any], name: str = "build", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for index, record in enumerate(records):
            messages = []
            for question, answer in record["rounds"]:
                messages += [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ]
            whole = {
                "id": f"{name}:{index}",
                "source": name,
                "style": record.get("style", "chat"),
                "images": record.get("images", []),
                "messages": messages,
                "meta": {},
            }
            lines.append(json.dumps({**whole, **record.get("changes", {})}, ensure_ascii=False))
        (folder / "conversations-00000-of-00001.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        return folder

    return write


def about(image: str, *rounds: tuple[str, str], **changes: Any) -> dict[str, Any]:
    (question, answer), *rest = rounds
    return {
        "rounds": [(f"<image>\n{question}", answer), *rest],
        "images": [image],
        "changes": changes,
    }


@pytest.fixture(name="about")
def about_fixture() -> Callable[..., dict[str, Any]]:
    """A record about one picture."""
    return about
