"""LRV-Instruction: GPT-4 questions about Visual Genome pictures, many about what is absent.

Record: `{"image_id", "question", "answer", "task"?}` in a list, which v1 wraps as `{"annotations":
[]}`. Use the files without coordinates (filter_cap1, filter_cap_more1) and the charts. `image_id`
is a Visual Genome number, or a file name for charts. The answers were written from captions, not
from pictures, so: "There is no mention of a teapot" is rewritten to "There is no teapot" (the
negative ones teach the model to say no and stay); answers that still speak of a description,
caption or bounding box, and rows with left-over coordinates, are dropped. `clean: false` keeps
them.

Usage:
    python -m data_builders.sources.lrv_instruction --annotations filter_cap1.json \\
        filter_cap_more1.json chart_release_update.json --images lrv/image lrv/chart_image \\
        --out builds/lrv
"""

import re
from collections import Counter
from typing import Any

from data_builders.clean import rounds
from data_builders.source import Draft, File, Source

_NO_MENTION = re.compile(r"\bthere (?:is|was) no mention of (?:an? |any |the )?", re.IGNORECASE)
_OF_THE_PROMPT = re.compile(
    r"\b(?:no mention of|not (?:mentioned|specified|stated|provided|described) in the"
    r"|(?:dense |image |given |provided )captions?\b|bounding box"
    r"|(?:the|given|provided) (?:image )?descriptions?\b)",
    re.IGNORECASE,
)
_COORDINATES = re.compile(
    r"\bX:\s*\d+.{0,12}?\bY:\s*\d+|\bWidth:\s*\d+.{0,12}?\bHeight:\s*\d+", re.IGNORECASE
)


class LrvInstruction(Source):
    """See the module."""

    name = "lrv_instruction"
    title = "LRV-Instruction, without coordinates, and its charts"
    license = "BSD-3-Clause (text by GPT-4), images CC-BY-4.0"
    home = "github.com/FuxiaoLiu/LRV-Instruction, links in download.txt (lines 28, 31, 33, 12, 36)"
    files = (
        File("filter_cap1.json", 0, "line 28; without coordinates"),
        File("filter_cap_more1.json", 0, "line 31; without coordinates; with both 342,799"),
        File("chart_release_update.json", 0, "line 33; charts, image_id is a file name"),
        File("filter_cap.json", 0, "line 5; v1 with coordinates, not advised"),
    )
    image_folders = ("image (the authors' archive, line 12)", "chart_image (line 36)")
    wrappers = ("annotations",)

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one record; see `Source.draft`."""
        if type(record) is not dict:
            return "record_not_an_object"
        question, answer = record.get("question"), record.get("answer")
        if type(question) is not str:
            return "question_not_a_text" if question is not None else "empty_question"
        if type(answer) is not str:
            return "answer_not_a_text" if answer is not None else "empty_answer"
        image = record.get("image_id")
        if type(image) is int:
            image = str(image)
        if type(image) is not str:
            return "image_name_missing" if image is None else "image_name_not_a_string"
        if not image.strip():
            return "image_name_missing"
        turns = rounds([question, answer], notes)
        if type(turns) is str:
            return turns
        assert isinstance(turns, list)
        if self.entry.clean:
            if "mention" in turns[1] and _NO_MENTION.search(turns[1]):
                turns[1] = _NO_MENTION.sub(_no, turns[1])
                notes["no_mention_rewritten"] += 1
            if _OF_THE_PROMPT.search(turns[1]):
                return "answer_speaks_of_the_prompt"
            if any(":" in text and _COORDINATES.search(text) for text in turns):
                return "coordinates_left_over"
        task = record.get("task")
        meta = {"task": task} if type(task) is str else {}
        image = image.strip()
        name = image if "." in image else f"{image}.jpg"
        return Draft(turns, [name], self.default_style, image, meta)


def _no(match: re.Match[str]) -> str:
    return "There is no " if match.group()[0] == "T" else "there is no "


SOURCE = LrvInstruction

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("lrv_instruction")
