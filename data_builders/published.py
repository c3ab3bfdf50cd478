"""What data sets publish: files to fetch with their sizes, and folders of pictures.

A size stands where the file is named, with who tells it in a comment beside; where nobody does, the
size is 0 and is spoken of as not published. Folders that several sets share stand here once.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class File:
    """A file to fetch.

    Attributes:
        name: With the folder that the shipped recipes expect it in, where other sets use the name.
        size: In bytes; 0 where nobody publishes it. The source's comment says who does.
        note: What it holds.
        exact: Whether the size is given to the byte; lists of files round to three digits.
    """

    name: str
    size: int
    note: str = ""
    exact: bool = False

    def size_in_words(self) -> str:
        """The size, with `~` before one that its publisher rounds."""
        if "*" in self.name:  # one's own files
            return ""
        if not self.size:
            return "size not published"
        units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("bytes", 1))
        unit, scale = next((unit, scale) for unit, scale in units if self.size >= scale)
        return f"{'' if self.exact else '~'}{self.size / scale:.3g} {unit}"


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of pictures, as the shipped recipes lay it out, and where it comes from."""

    name: str
    note: str = ""


# Sizes: file lists of huggingface.co/datasets, QingyiSi/llava_data (COCO), nlphuji/flickr30k, and
# BAAI/DataOptim (Visual Genome); counts: cocodataset.org and the README of Flickr30k Entities.
COCO_TRAIN2014 = Folder(
    "coco/train2014", "train2014.zip, ~13.5 GB, 82,783 pictures; or train2017 of the same numbers"
)
COCO_VAL2014 = Folder("coco/val2014", "val2014.zip, ~6.65 GB, 40,504 pictures")
FLICKR30K = Folder(
    "flickr30k-images",
    "flickr30k-images.zip, ~4.39 GB, on request from the authors; 31,783 pictures",
)
VISUAL_GENOME = (
    Folder("vg/VG_100K", "images.zip of Visual Genome, ~9.73 GB; cs.stanford.edu/people/rak248"),
    Folder("vg/VG_100K_2", "images2.zip, ~5.47 GB"),
)
