"""OK-VQA: questions that need knowledge from outside the picture, in VQAv2's two-file form.

Each question has the answers of five people, each counted twice; the training answer is the
majority, the first on ties, in its spelled form (version 1.1 mends the stemming of 1.0).

Usage:
    python -m data_builders.sources.okvqa --questions OpenEnded_mscoco_train2014_questions.json \\
        --annotations mscoco_train2014_annotations.json --images coco --out builds/okvqa
"""

from data_builders.source import File
from data_builders.sources.vqav2 import JoinedVqa


class Okvqa(JoinedVqa):
    """See the module."""

    name = "okvqa"
    title = "OK-VQA 1.1"
    license = "CC-BY-4.0"
    home = "okvqa.allenai.org; COCO: cocodataset.org"
    files = (
        File("OpenEnded_mscoco_train2014_questions.json", 0, "9,009 questions"),
        File("mscoco_train2014_annotations.json", 0, "answers"),
        File("OpenEnded_mscoco_val2014_questions.json", 0, "5,046; held out"),
        File("mscoco_val2014_annotations.json", 0, "held out"),
    )
    image_folders = ("train2014, val2014, or train2017",)


SOURCE = Okvqa

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("okvqa")
