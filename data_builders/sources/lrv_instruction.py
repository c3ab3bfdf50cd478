"""LRV-Instruction: GPT-4 questions about Visual Genome pictures, many about what is absent.

Record: `{"image_id", "question", "answer", "task"?}` in a list, which v1 wraps as `{"annotations":
[]}`. Use the files without coordinates (filter_cap1, filter_cap_more1) and the charts. `image_id`
is a Visual Genome number, or a file name for charts. The answers were written from captions, not
from pictures, so: "There is no mention of a teapot" is rewritten to "There is no teapot" (the
negative ones teach the model to say no and stay); answers that still speak of a description,
caption or bounding box, and rows with left-over coordinates, are dropped. `clean: false` keeps
them. Declarative instructions and several questions about a picture stay as they are. The set's own
evaluation file names 1,000 questions about 120 pictures: put it under `decontaminate.against`.

Usage:
    python -m data_builders.sources.lrv_instruction --annotations filter_cap1.json \\
        filter_cap_more1.json chart_release_update.json --images lrv/image lrv/chart_image \\
        --out builds/lrv
"""

import re
from collections import Counter
from typing import Any

from data_builders.source import Draft, File, Folder, Source

# "whether it is red", "it" and the like make no sentence with "there is no"; those rows are dropped
_NO_MENTION = re.compile(
    r"\b(?P<there>there)(?: is| was| are|['\u2019]s) no mentions? of (?:an? |any |the )?"
    r"(?!(?:whether|if|what|which|who|how|where|when|why|it|this|that|these|those|them|such)\b)"
    r"(?=(?P<thing>\w+))",
    re.IGNORECASE,
)
_OF_THE_PROMPT = re.compile(
    r"(?:\bnot|n['\u2019]t) (?:explicitly |specifically )?(?:mention|specif|state)"
    r"|\b(?:no mentions? of"
    r"|not (?:provided|described|given) in the"
    r"|(?:the|this|these|dense|image|given|provided) (?:dense )?captions?\b|bounding box"
    r"|(?:the|this|given|provided) (?:image )?descriptions?\b)",
    re.IGNORECASE,
)
_COORDINATES = re.compile(
    r"\b(?:X|Y|Width|Height):\s*-?\d+(?:\.\d+)?\b.{0,12}?\b(?:X|Y|Width|Height):\s*-?\d",
    re.IGNORECASE,
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
        File("evaluation_set.json", 0, "Evaluation/; 120 pictures held out, for decontaminate"),
        File("filter_cap.json", 0, "line 5; v1 with coordinates, not advised"),
    )
    image_folders = (
        Folder("lrv/image", "the authors' archive, line 12; or Visual Genome's folders"),
        Folder("lrv/chart_image", "line 36"),
    )
    wrappers = ("annotations",)

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one record; see `Source.draft`."""
        if type(record) is not dict:
            return "record_not_an_object"
        image = record.get("image_id")
        if type(image) is int:
            image = str(image)
        name = image.strip() if type(image) is str else image
        task = record.get("task")
        draft = self.short(
            record.get("question"),
            record.get("answer"),
            f"{name}.jpg" if type(name) is str and name and "." not in name else name,
            notes,
            orig_id=name,
            meta={"task": task} if type(task) is str else {},
        )
        return self._clean(draft, notes) if self.entry.clean else draft

    def _clean(self, draft: Draft | str, notes: Counter[str]) -> Draft | str:
        """Rewrites or drops what speaks of the prompt, and drops coordinates."""
        if isinstance(draft, str):
            return draft
        turns = draft.turns
        if "mention" in turns[1] and _NO_MENTION.search(turns[1]):
            turns[1] = _NO_MENTION.sub(_no, turns[1])
            notes["no_mention_rewritten"] += 1
        if _OF_THE_PROMPT.search(turns[1]):
            return "answer_speaks_of_the_prompt"
        if any(":" in text and _COORDINATES.search(text) for text in turns):
            return "coordinates_left_over"
        return draft


def _no(match: re.Match[str]) -> str:
    thing = match["thing"]
    several = thing.endswith("s") and not thing.endswith(("ss", "us", "is"))
    return f"{match['there']} {'are' if several else 'is'} no "


SOURCE = LrvInstruction

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("lrv_instruction")
