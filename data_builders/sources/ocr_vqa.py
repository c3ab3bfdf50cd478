"""OCR-VQA: questions about book covers, one JSON object keyed by the book's number.

Entry: `{"imageURL", "questions": […], "answers": […], "title", "authorName", "genre", "split"}`,
split 1, 2, 3 for train, val, test; only train enters unless `splits` says otherwise. Every question
is a record of its own. The picture is the key with the URL's extension, or `.jpg` as LLaVA's script
saves it (GIFs too); both are found.

Usage:
    python -m data_builders.sources.ocr_vqa --annotations dataset.json --images ocr_vqa/images \\
        --out builds/ocr_vqa
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from data_builders.annotations import ROWS, Batch, read_mapping
from data_builders.images import SUFFIXES, ImageFinder
from data_builders.published import File, Folder
from data_builders.source import Draft, Source
from data_builders.splits import SplitOptions

_SPLITS = {1: "train", 2: "val", 3: "test", "1": "train", "2": "val", "3": "test"}


class OcrVqa(Source):
    """See the module."""

    name = "ocr_vqa"
    title = "OCR-VQA"
    license = "research use"
    commercial = False
    home = "ocr-vqa.github.io"
    # Sizes: file lists of huggingface.co/datasets/hunarbatra/LLaVA-finetune665k and of
    # huggingface.co/datasets/weizhiwang/llava_v15_instruction_images.
    files = (File("ocr_vqa/dataset.json", 113_000_000, "207,572 covers, about 1M questions"),)
    image_folders = (
        Folder(
            "ocr_vqa/images", "fetched from the URLs in the file; mirrored as a zip of ~8.97 GB"
        ),
    )
    style = "vqa"
    Options = SplitOptions

    def batches(self, finder: ImageFinder) -> Iterator[Batch]:
        """Questions, one record each; an entry without questions is one record too."""
        for path in self.inputs():
            start = 0
            rows: list[Any] = []
            for key, entry in read_mapping(path):
                rows += _questions(key, entry)
                if len(rows) >= ROWS:
                    yield Batch(path.name, start, rows)
                    start, rows = start + len(rows), []
            if rows:
                yield Batch(path.name, start, rows)

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one question; see `Source.draft`."""
        if "problem" in record:
            return str(record["problem"])
        split = record["split"]
        if split not in self.options.splits:
            return "split_missing" if split is None else "held_out_split"
        ending = PurePosixPath(record["url"]).suffix.lower()
        return self.short(
            record["question"],
            record["answer"],
            record["key"] + (ending if ending in SUFFIXES else ".jpg"),
            notes,
            orig_id=record["key"],
            meta={} if split == "train" else {"split": split},
        )


def _questions(key: str, entry: Any) -> list[dict[str, Any]]:
    if type(entry) is not dict:
        return [{"key": key, "problem": "record_not_an_object"}]
    questions, answers = entry.get("questions"), entry.get("answers")
    if type(questions) is not list or type(answers) is not list or not questions:
        return [{"key": key, "problem": "turns_missing"}]
    if len(questions) != len(answers):
        return [{"key": key, "problem": "answer_count_differs"} for _ in questions]
    split = entry.get("split")
    known = _SPLITS.get(split) if type(split) in (int, str) else None
    url = str(entry.get("imageURL") or "")
    return [
        {"key": key, "question": question, "answer": answer, "split": known, "url": url}
        for question, answer in zip(questions, answers, strict=True)
    ]


SOURCE = OcrVqa

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("ocr_vqa")
