"""Flickr30k captions: five sentences a picture, in Karpathy's split or in the original file.

Karpathy's `dataset_flickr30k.json`, and the same as a table (`flickr_annotations_30k.csv`), say
which picture belongs to which split; the 1,014 of val and the 1,000 of test stay out unless
`splits` names them. The original `results_20130124.token` (`1000092795.jpg#0<tab>sentence`) and
Kaggle's `results.csv` (columns between `|`) have no splits: list `train.txt`, `val.txt` and
`test.txt` of Flickr30k Entities beside them, or every picture enters, counted as `split_unknown`.

Usage:
    python -m data_builders.sources.flickr30k --annotations dataset_flickr30k.json \\
        --images flickr30k-images --out builds/flickr30k
    python -m data_builders.sources.flickr30k --annotations results_20130124.token train.txt \\
        val.txt test.txt --images flickr30k-images --out builds/flickr30k
"""

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from cogvlm_sft.errors import DataError
from data_builders.annotations import ROWS, require_file
from data_builders.caption_sets import CaptionSource
from data_builders.json_array import loads
from data_builders.published import FLICKR30K, File
from data_builders.splits import SplitLists, is_split_list, split_named
from data_builders.tables import csv_rows

_TOKEN = re.compile(r"([^#\t|]+)#\s*(\d+)\t(.*)")
_PIPES = re.compile(r"([^|]+)\|\s*(\d+)\s*\|(.*)")
_COLUMNS = {"image": "filename", "caption": "raw", "split": "split"}


class Flickr30k(CaptionSource):
    """See the module."""

    name = "flickr30k"
    title = "Flickr30k captions, Karpathy's split or the original file"
    license = "non-commercial research"
    commercial = False
    home = (
        "cs.stanford.edu/people/karpathy/deepimagesent (caption_datasets.zip); pictures on request"
    )
    # Sizes: file lists of huggingface.co/datasets/openflamingo/eval_benchmark and, of the table and
    # the pictures, huggingface.co/datasets/nlphuji/flickr30k.
    files = (
        File("dataset_flickr30k.json", 38_300_000, "31,014 pictures; about 29,000 train"),
        File("flickr_annotations_30k.csv", 12_900_000, "the same as a table"),
        File("results_20130124.token", 0, "31,783 pictures, without splits"),
    )
    image_folders = (FLICKR30K,)

    def _rows(self, path: Path) -> Iterator[list[Any]]:
        if is_split_list(path):
            return
        if path.suffix.lower() not in (".token", ".csv", ".txt", ".tsv"):
            yield from super()._rows(path)
            return
        with require_file(path).open("rb") as stream:
            first = stream.readline(256)
        rows = self._lines(path) if b"|" in first or b"#" in first else _karpathy(path)
        while part := list(islice(rows, ROWS)):
            yield part

    def _lines(self, path: Path) -> Iterator[dict[str, Any]]:
        """Captions of a file with one a line; a header is none."""
        lists = SplitLists(super().inputs())
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    place = stream.tell() - len(raw) + error.start
                    raise DataError(f"{path}:{number}: not UTF-8 at byte {place}") from None
                if not line.strip() or (number == 1 and line.startswith("image_name")):
                    continue
                match = _TOKEN.fullmatch(line) or _PIPES.fullmatch(line)
                row: dict[str, Any] = {"split": "train", "split_unknown": not lists.known}
                if match is None and not raw.endswith(b"\n"):
                    raise DataError(
                        f"{path}:{number}: the file ends at byte {stream.tell()} inside this line; "
                        "it is truncated: fetch it again"
                    )
                if match is None:  # Kaggle's copy has one: 2199200615.jpg, its fifth sentence
                    yield row | {"problem": "line_malformed", "record": f"line {number}: {line}"}
                    continue
                name = match[1].strip()
                if lists.known:
                    row["split"] = lists.of(Path(name).stem)
                yield row | {"image": name, "id": f"{name}#{match[2]}", "caption": match[3]}


def _karpathy(path: Path) -> Iterator[dict[str, Any]]:
    """Captions of the table whose `raw` holds the sentences of a picture as a JSON list."""
    for cells in csv_rows(path, ",", _COLUMNS):
        row: dict[str, Any] = {"split": split_named(cells.get("split"))}
        try:
            sentences = loads((cells.get("raw") or "").encode())
        except ValueError:
            sentences = None
        if "_malformed" in cells or type(sentences) is not list or not sentences:
            problem = cells.get("_malformed", "picture_without_caption")
            yield row | {"problem": problem, "record": cells}
            continue
        for sentence in sentences:
            yield row | {"image": cells["filename"], "caption": sentence, "id": cells["filename"]}


SOURCE = Flickr30k

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("flickr30k")
