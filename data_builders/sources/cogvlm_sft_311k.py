"""CogVLM-SFT-311K: the released piece of CogVLM's own data, in English and Chinese.

Three folders (captions; multi-turn; single-turn), each with `images/00000001.jpg` and label folders
`labels*` that hold one JSON file a picture, paired by the file's stem. `--annotations` takes the
unpacked folder, or any of the three; their names are found with and without an s at the end. A
label is `{"captions": [{"role": "caption", "content"}]}` or `{"conversations": [{"role",
"content"}]}`, with no picture marker. A caption has no question, so it becomes the answer to one of
five fixed requests in its own language, chosen by the hash of its text. The language is that of the
folder's name (`labels_en`, `labels_zh`), else that of the text. The set corrects LLaVA-Instruct's
dialogues: build it instead of that set, not beside it.

Usage:
    python -m data_builders.sources.cogvlm_sft_311k --annotations CogVLM-SFT-311K \\
        --images CogVLM-SFT-311K --languages en zh --out builds/cogvlm311k
"""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from cogvlm_sft.errors import DataError
from data_builders.annotations import Batch, read_json
from data_builders.clean import choose, dialogue, rounds
from data_builders.images import ImageFinder
from data_builders.published import File, Folder
from data_builders.recipe import SourceEntry, Strict
from data_builders.source import Draft, Source

_ROWS = 500
_HAN = re.compile("[\u4e00-\u9fff]")
_LATIN = re.compile("[A-Za-z]+")
_REQUESTS = {
    "en": (
        "Describe this image in detail.",
        "What is in this picture? Please describe it in detail.",
        "Can you give a detailed description of the image?",
        "Take a look at this image and describe what you notice.",
        "Please provide a detailed description of the picture.",
    ),
    "zh": (
        "请详细描述这张图片。",
        "这张图片里有什么?请详细描述。",
        "你能详细描述一下这幅图像吗?",
        "看看这张图片,描述你注意到的内容。",
        "请提供这张图片的详细描述。",
    ),
}


class Options311k(Strict):
    """Options.

    Attributes:
        languages: Which languages to take: en, zh.
    """

    languages: list[Literal["en", "zh"]] = Field(default=["en", "zh"], min_length=1)


class CogvlmSft311k(Source):
    """See the module."""

    name = "cogvlm_sft_311k"
    title = "CogVLM-SFT-311K, English and Chinese"
    license = "CC-BY-NC-4.0"
    commercial = False
    home = "huggingface.co/datasets/THUDM/CogVLM-SFT-311K"
    # Size: the file list there.
    files = (
        File("CogVLM-SFT-311K.zip", 8_219_020_365, "155,771 pictures, labels in both", exact=True),
    )
    image_folders = (Folder("CogVLM-SFT-311K", "unpacked; pictures lie beside their labels"),)
    reads_folders = True
    Options = Options311k

    def __init__(self, entry: SourceEntry) -> None:
        super().__init__(entry)
        self._labels: list[Path] | None = None

    def inputs(self) -> list[Path]:
        """Every label file, in a stable order."""
        if self._labels is not None:
            return self._labels
        found: list[Path] = []
        for path in super().inputs():
            if not path.is_dir():
                found_here = "is a file" if path.exists() else "no such folder"
                raise DataError(f"{path}: {found_here}; expected CogVLM-SFT-311K, unpacked")
            labels = [p for p in path.glob("**/labels*/*.json") if not p.name.startswith(".")]
            if _parts(path)[-1].startswith("labels"):
                labels += path.glob("*.json")
            if not labels:
                raise DataError(
                    f"{path}: holds no labels*/*.json; expected folders such as "
                    "llava_instruction_multi_conversation_formate/labels"
                )
            found += labels
        self._labels = sorted(set(found), key=lambda path: _parts(path)[-3:])
        return self._labels

    def batches(self, finder: ImageFinder) -> Iterator[Batch]:
        """Label files, each with the path of its picture."""
        part: list[Any] = []
        group, start = "", 0
        for path in self.inputs():
            folder, inside, _ = _parts(path)[-3:]
            label = f"{folder}/{inside}"
            if label != group or len(part) == _ROWS:
                if part:
                    yield Batch(group, start, part)
                start = start + len(part) if label == group else 0
                part, group = [], label
            content = read_json(path)
            part.append(
                {
                    "_stem": path.stem,
                    "_folder": folder,
                    "_label": content,
                    "_in": inside,
                }
            )
        if part:
            yield Batch(group, start, part)

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one label; see `Source.draft`."""
        label = record["_label"]
        if type(label) is not dict:
            return "record_not_an_object"
        if "conversations" in label:
            turns = dialogue(label["conversations"], notes)
        else:
            turns = _caption(label.get("captions"), notes)
        if type(turns) is str:
            return turns
        assert isinstance(turns, list)
        folder = str(record.get("_in", "")).rsplit("_", 1)[-1]
        language = folder if folder in _REQUESTS else _language(" ".join(turns))
        if language not in self.options.languages:
            return f"language_{language}_not_wanted"
        name = f"{record['_folder']}/images/{record['_stem']}.jpg"
        meta = {"language": language, "subset": record["_folder"]}
        return Draft(turns, [name], self.default_style, record["_stem"], meta)


def _parts(path: Path) -> tuple[str, ...]:
    """The names on the way to a path: `.` has none itself, and links keep theirs."""
    return Path(os.path.abspath(path)).parts


def _caption(captions: Any, notes: Counter[str]) -> list[str] | str:
    if type(captions) is not list or not captions:
        return "turns_missing"
    caption = captions[0].get("content") if type(captions[0]) is dict else None
    if type(caption) is not str:
        return "text_not_a_string"
    if len(captions) > 1:
        notes["further_captions_left_out"] += len(captions) - 1
    return rounds([choose(_REQUESTS[_language(caption)], caption), caption], notes)


def _language(text: str) -> str:
    """Chinese where there are more Han characters than Latin words: both quote the other."""
    return "zh" if len(_HAN.findall(text)) > len(_LATIN.findall(text)) else "en"


SOURCE = CogvlmSft311k

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("cogvlm_sft_311k")
