"""ScienceQA: school questions with choices, one JSON object keyed by problem.

Entry: `{"question", "choices", "answer": index, "hint", "image": "image.png"|null, "split"}`; the
picture is `<split>/<id>/image.png`. The question stands behind the hint, where there is one, and
before the choices as `A. …` lines; the answer is the letter. Problems without a picture are left
out unless `text_only` is set. The split stands in each entry; where `pid_splits.json` is listed
too, a problem that either of them holds out stays out.

Usage:
    python -m data_builders.sources.scienceqa --annotations problems.json \\
        --images scienceqa/images --out builds/scienceqa
"""

from collections import Counter
from collections.abc import Iterator
from types import NoneType
from typing import Any

from data_builders.annotations import Batch, read_keyed, read_mapping
from data_builders.clean import rounds, text_of
from data_builders.images import ImageFinder
from data_builders.prompts import lettered
from data_builders.published import File, Folder
from data_builders.source import Draft, Source
from data_builders.splits import SplitOptions, split_named

_SPLIT_LISTS = "pid_splits.json"


class ScienceOptions(SplitOptions):
    """Options.

    Attributes:
        text_only: Whether problems without a picture enter, true or false.
    """

    text_only: bool = False


class Scienceqa(Source):
    """See the module."""

    name = "scienceqa"
    title = "ScienceQA"
    license = "CC-BY-NC-SA-4.0"
    commercial = False
    home = "scienceqa.github.io"
    # Sizes: file list of huggingface.co/acheong08/mm-cot, data/scienceqa.
    files = (
        File(
            "scienceqa/problems.json", 31_500_000, "21,208 problems; 6,218 of train show a picture"
        ),
        File("pid_splits.json", 503_000, "lists of problems; each problem tells its split, too"),
    )
    image_folders = (
        Folder(
            "scienceqa/images",
            "train.zip (val.zip, test.zip), sizes not published, unpacked: train/<id>/image.png",
        ),
    )
    style = "vqa"
    Options = ScienceOptions

    def batches(self, finder: ImageFinder) -> Iterator[Batch]:
        """Problems with their number, and with the split that `pid_splits.json` gives them."""
        listed: dict[str, set[str]] = {}
        for path in self.inputs():
            if path.name == _SPLIT_LISTS:
                for split, numbers in read_mapping(path):
                    for number in numbers if isinstance(numbers, list) else ():
                        listed.setdefault(str(number), set()).add(split)
        for path in self.inputs():
            if path.name == _SPLIT_LISTS:
                continue
            for batch in read_keyed(path):
                for record in batch.records if listed else ():
                    record["lists"] = listed.get(record["id"], set()) & {"val", "test"}
                yield batch

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one problem; see `Source.draft`."""
        entry = record["entry"]
        if type(entry) is not dict:
            return "record_not_an_object"
        split = split_named(entry.get("split"))
        if any(name not in self.options.splits for name in record.get("lists", ())):
            return "held_out_split"
        if split not in self.options.splits:
            return "split_missing" if split is None else "held_out_split"
        image = entry.get("image")
        if not image and not self.options.text_only:
            return "no_picture"
        if image and type(image) is not str:
            return "image_name_not_a_string"
        choices, answer = entry.get("choices"), entry.get("answer")
        if type(choices) is not list or not 2 <= len(choices) <= 26:
            return "choices_missing"
        if type(answer) is not int or not 0 <= answer < len(choices):
            return "answer_not_among_choices"
        question = entry.get("question")
        options = [(text_of(choice) or "").strip() for choice in choices]
        if type(question) is not str or not question.strip():
            return "empty_question" if type(question) in (str, NoneType) else "question_not_a_text"
        if not all(options):
            return "choices_missing"
        hint = entry.get("hint")
        asked = lettered(question, options, hint if type(hint) is str else "")
        turns = rounds([asked, chr(65 + answer)], notes)
        if type(turns) is str:
            return turns
        assert isinstance(turns, list)
        images = [f"{entry['split']}/{record['id']}/{image}"] if image else []
        meta = {} if split == "train" else {"split": split}
        return Draft(turns, images, self.default_style, record["id"], meta)


SOURCE = Scienceqa

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("scienceqa")
