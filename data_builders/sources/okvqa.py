"""OK-VQA: questions that need knowledge from outside the picture, in VQAv2's two-file form.

Five people answered each question and each answer counts twice; the training answer is the
majority of the `answer` fields, the first on ties. Use version 1.1, which mends the stemming of 1.0
("pony tail"); `raw_answer` is not read.

Usage:
    python -m data_builders.sources.okvqa --questions OpenEnded_mscoco_train2014_questions.json \\
        --annotations mscoco_train2014_annotations.json --images coco --out builds/okvqa
"""

from data_builders.question_sets import JoinedVqa
from data_builders.source import File, Folder


class Okvqa(JoinedVqa):
    """See the module."""

    name = "okvqa"
    title = "OK-VQA 1.1"
    license = "CC-BY-4.0"
    home = "okvqa.allenai.org; COCO: cocodataset.org"
    image_folders = (
        Folder("coco/train2014", "train2014.zip, 13.5 GB, 82,783 pictures; or train2017"),
    )
    files = (
        File("okvqa/OpenEnded_mscoco_train2014_questions.json", 0, "9,009 questions"),
        File("okvqa/mscoco_train2014_annotations.json", 0, "ten answers a question"),
        File("okvqa/OpenEnded_mscoco_val2014_questions.json", 0, "5,046; held out"),
        File("okvqa/mscoco_val2014_annotations.json", 0, "held out"),
    )


SOURCE = Okvqa

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("okvqa")
