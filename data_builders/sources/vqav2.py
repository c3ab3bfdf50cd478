"""VQAv2: questions about COCO pictures, ten human answers each, question and answer files apart.

`--questions` takes the question files, `--annotations` the answer files; they are joined by
`question_id`. The training answer is `multiple_choice_answer`, the majority of the ten, or where it
is missing their majority, the first on ties (the other usual choice, drawing an answer by its
frequency, is not offered). Pictures are `COCO_train2014_%012d.jpg`, and are found under train2017
names too. A file of the validation split is refused record by record, unless `splits` names it for
a build to evaluate on.

Usage:
    python -m data_builders.sources.vqav2 \\
        --questions v2_OpenEnded_mscoco_train2014_questions.json \\
        --annotations v2_mscoco_train2014_annotations.json --images coco --out builds/vqav2
"""

from data_builders.published import COCO_TRAIN2014, File
from data_builders.question_sets import JoinedVqa


class Vqav2(JoinedVqa):
    """See the module."""

    name = "vqav2"
    title = "VQAv2, real images"
    license = "CC-BY-4.0"
    home = (
        "visualqa.org/download.html (v2_Questions_Train_mscoco.zip, "
        "v2_Annotations_Train_mscoco.zip); images.cocodataset.org/zips"
    )
    # Sizes: file list of huggingface.co/oclmodels/vqav2_questions; counts: visualqa.org.
    files = (
        File("v2_OpenEnded_mscoco_train2014_questions.json", 42_000_000, "443,757 questions"),
        File("v2_mscoco_train2014_annotations.json", 356_000_000, "ten answers a question"),
        File("v2_OpenEnded_mscoco_val2014_questions.json", 20_200_000, "214,354; held out"),
        File("v2_mscoco_val2014_annotations.json", 172_000_000, "held out"),
    )
    image_folders = (COCO_TRAIN2014,)


SOURCE = Vqav2

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("vqav2")
