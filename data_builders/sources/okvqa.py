"""OK-VQA: questions that need knowledge from outside the picture, in VQAv2's two-file form.

Five people answered each question and each answer counts twice; the training answer is the
majority of the `answer` fields, the first on ties. Version 1.0 stemmed them into words that do not
exist ("poni tail"); 1.1 mends that, and it is mended here where `raw_answer` shows the word.

Usage:
    python -m data_builders.sources.okvqa --questions OpenEnded_mscoco_train2014_questions.json \\
        --annotations mscoco_train2014_annotations.json --images coco --out builds/okvqa
"""

from collections import Counter
from typing import Any

from data_builders.published import COCO_TRAIN2014, File
from data_builders.question_sets import JoinedVqa


class Okvqa(JoinedVqa):
    """See the module."""

    name = "okvqa"
    title = "OK-VQA 1.1"
    license = "CC-BY-4.0"
    home = "okvqa.allenai.org/download.html; images.cocodataset.org/zips"
    image_folders = (COCO_TRAIN2014,)
    # Sizes: file list of huggingface.co/spaces/m7mdal7aj/KB-VQA, which holds them as released.
    files = (
        File("okvqa/OpenEnded_mscoco_train2014_questions.json", 932_000, "9,009 questions"),
        File("okvqa/mscoco_train2014_annotations.json", 15_200_000, "ten answers a question"),
        File("okvqa/OpenEnded_mscoco_val2014_questions.json", 522_000, "5,046; held out"),
        File("okvqa/mscoco_val2014_annotations.json", 8_490_000, "held out"),
    )

    def mend(self, given: str, answer: dict[str, Any], notes: Counter[str]) -> str:
        """Undoes the stem of words in y, `poni` for `pony`, by what the person typed."""
        typed = " ".join(
            str(human.get("raw_answer"))
            for human in answer["answers"]
            if isinstance(human, dict) and human.get("answer") == given
        )
        known = set(typed.lower().split())
        words = [
            word[:-1] + "y" if word.endswith("i") and word[:-1] + "y" in known else word
            for word in given.split(" ")
        ]
        mended = " ".join(words)
        notes["stemming_mended"] += mended != given
        return mended


SOURCE = Okvqa

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("okvqa")
