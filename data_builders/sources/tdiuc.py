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
from data_builders.question_sets import JoinedVqa
from data_builders.source import File, Folder


class Tdiuc(JoinedVqa):
    """See the module."""

    name = "tdiuc"
    title = "TDIUC"
    license = "not stated; images of COCO and Visual Genome"
    commercial = False
    home = "kushalkafle.com/projects/tdiuc.html; COCO: cocodataset.org; Visual Genome"
    files = (
        File(
            "tdiuc/Questions/OpenEnded_mscoco_train2014_questions.json",
            0,
            "in TDIUC.zip; 1.65M with val",
        ),
        File("tdiuc/Annotations/mscoco_train2014_annotations.json", 0, "one answer a question"),
        File("tdiuc/Questions/OpenEnded_mscoco_val2014_questions.json", 0, "held out"),
        File("tdiuc/Annotations/mscoco_val2014_annotations.json", 0, "held out"),
    )
    image_folders = (
        Folder("coco/train2014", "train2014.zip, 13.5 GB, 82,783 pictures; or train2017"),
        Folder("vg/VG_100K", "images.zip of Visual Genome"),
        Folder("vg/VG_100K_2", "images2.zip"),
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
