"""ScienceQA: school questions with choices, one JSON object keyed by problem.

Entry: `{"question", "choices", "answer": index, "hint", "image": "image.png"|null, "split"}`; the
picture is `<split>/<id>/image.png`. The question is followed by the hint, where there is one, and
the choices as `A. …` lines; the answer is the letter. Problems without a picture are left out
unless `text_only` is set. `pid_splits.json` is not needed: the split stands in each entry.

Usage:
    python -m data_builders.sources.scienceqa --annotations problems.json \\
        --images scienceqa/images --out builds/scienceqa
"""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from data_builders.annotations import ROWS, Batch, read_mapping
from data_builders.clean import rounds, text_of
from data_builders.images import ImageFinder
from data_builders.source import Draft, File, Source
from data_builders.sources.textvqa import SplitOptions

_ASK = "Answer with the option's letter from the given choices directly."


class ScienceOptions(SplitOptions):
    """Options: splits, and whether problems without a picture enter."""

    text_only: bool = False


class Scienceqa(Source):
    """See the module."""

    name = "scienceqa"
    title = "ScienceQA"
    license = "CC-BY-NC-SA-4.0"
    commercial = False
    home = "scienceqa.github.io"
    files = (File("problems.json", 0, "21,208 problems; 6,218 of train have a picture"),)
    image_folders = ("images (holds train/<id>/image.png)",)
    style = "vqa"
    Options = ScienceOptions

    def batches(self, finder: ImageFinder) -> Iterator[Batch]:
        """Problems with their number."""
        for path in self.inputs():
            pairs = read_mapping(path)
            start = 0
            while part := [{"id": key, "entry": entry} for key, entry in islice(pairs, ROWS)]:
                yield Batch(path.name, start, part)
                start += len(part)

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one problem; see `Source.draft`."""
        entry = record["entry"]
        if type(entry) is not dict:
            return "record_not_an_object"
        split = entry.get("split")
        if split not in self.options.splits:
            return "held_out_split"
        image = entry.get("image")
        if not image and not self.options.text_only:
            return "no_picture"
        choices, answer = entry.get("choices"), entry.get("answer")
        if type(choices) is not list or not 2 <= len(choices) <= 26:
            return "choices_missing"
        if type(answer) is not int or not 0 <= answer < len(choices):
            return "answer_not_among_choices"
        question = text_of(entry.get("question"))
        options = [text_of(choice) for choice in choices]
        if not question or not all(options):
            return "empty_question" if not question else "choices_missing"
        lines = [question.strip()]
        hint = entry.get("hint")
        if type(hint) is str and hint.strip():
            lines.append(f"Context: {hint.strip()}")
        lines += [f"{chr(65 + n)}. {choice}" for n, choice in enumerate(options)]
        turns = rounds(["\n".join([*lines, _ASK]), chr(65 + answer)], notes)
        if type(turns) is str:
            return turns
        assert isinstance(turns, list)
        images = [f"{split}/{record['id']}/{image}"] if image else []
        return Draft(turns, images, self.default_style, record["id"])


SOURCE = Scienceqa

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("scienceqa")
