"""TDIUC: twelve kinds of questions about COCO and Visual Genome pictures, in VQAv2's two-file form.

One answer a question; `question_type` goes to `meta`, since scores are means over the twelve kinds.
Questions of the kind `absurd` ask about what is not there and are answered `doesnotapply`; they
stay. The set names every picture as COCO does; one that is not there under that name is looked up
as a Visual Genome id in VG_100K and VG_100K_2.

Usage:
    python -m data_builders.sources.tdiuc \\
        --questions Questions/OpenEnded_mscoco_train2014_questions.json \\
        --annotations Annotations/mscoco_train2014_annotations.json \\
        --images coco/train2014 vg --out builds/tdiuc
"""

from typing import Any

from data_builders.images import ImageFinder
from data_builders.published import COCO_TRAIN2014, VISUAL_GENOME, File
from data_builders.question_sets import JoinedVqa


class Tdiuc(JoinedVqa):
    """See the module."""

    name = "tdiuc"
    title = "TDIUC"
    license = "not stated; images of COCO and Visual Genome"
    commercial = False
    home = "kushalkafle.com/data/TDIUC.zip; images.cocodataset.org/zips"
    # Size: the README of a repository that fetches it ("~70 MB"); of what it holds, none is known.
    files = (
        File("TDIUC.zip", 70_000_000, "holds the files below; 1.65M questions with val"),
        File("tdiuc/Questions/OpenEnded_mscoco_train2014_questions.json", 0, "questions"),
        File("tdiuc/Annotations/mscoco_train2014_annotations.json", 0, "one answer a question"),
        File("tdiuc/Questions/OpenEnded_mscoco_val2014_questions.json", 0, "held out"),
        File("tdiuc/Annotations/mscoco_val2014_annotations.json", 0, "held out"),
    )
    image_folders = (
        COCO_TRAIN2014,
        *VISUAL_GENOME,
    )

    def picture(self, image_id: Any, split: str, finder: ImageFinder) -> str | None:
        """COCO's name, or Visual Genome's where there is no such COCO picture."""
        name = super().picture(image_id, split, finder)
        if name is not None and finder.find(name)[0] is None:
            genome = f"VG_100K/{int(image_id)}.jpg"
            return genome if finder.find(genome)[0] is not None else name
        return name

    def facts(self, answer: dict[str, Any]) -> dict[str, Any]:
        """The kind of the question."""
        kind = answer.get("question_type")
        return {"question_type": kind} if isinstance(kind, str) else {}


SOURCE = Tdiuc

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("tdiuc")
