"""Flickr30k Entities: captions whose phrases are tied to boxes, as grounded captions.

`--annotations` takes the unpacked repository, or any folders and files of it: `Sentences/<id>.txt`
with five lines such as `[/EN#283585/people Two people] sit .`, `Annotations/<id>.xml` with the
boxes of each chain, `train.txt`, `val.txt` and `test.txt`, and `UNRELATED_CAPTIONS`, whose captions
are dropped. Every sentence is a record: each phrase whose chain has boxes is followed by them,
`Two people [[102,033,410,871;500,040,733,902]] sit .`; phrases without (scenes, what is not
visible) stay plain, and a sentence without any box is asked for as a plain caption. Pictures of
`val.txt` and `test.txt` stay out unless `splits` names them; annotations.zip holds no lists, and
without them every picture enters, counted as `split_unknown`. A broken XML file fails the build.

Usage:
    python -m data_builders.sources.flickr30k_entities --annotations flickr30k_entities \\
        --images flickr30k-images --out builds/flickr30k_entities
"""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from cogvlm_sft.errors import DataError
from data_builders.annotations import ROWS, Batch, require_file
from data_builders.boxes import Corners, box_text, corners, look_up_size, picture_size
from data_builders.caption_sets import REQUESTS
from data_builders.clean import choose
from data_builders.images import ImageFinder
from data_builders.published import FLICKR30K, File
from data_builders.recipe import SourceEntry
from data_builders.source import Draft, Source
from data_builders.splits import SplitLists, SplitOptions, is_split_list

GROUNDED_REQUESTS = (
    "Describe the image in one sentence, with the box of each thing in [[x0,y0,x1,y1]] format.",
    "Provide a caption, and after each phrase where it is in [[x0,y0,x1,y1]] format.",
    "What does the picture show, and where? Give boxes in [[x0,y0,x1,y1]] format.",
)
_PHRASE = re.compile(r"\[/EN#(\d+)(?:/[^\s\[\]/]+)*\s+([^\[\]]+)\]")


class Flickr30kEntities(Source):
    """See the module."""

    name = "flickr30k_entities"
    title = "Flickr30k Entities, grounded captions"
    license = "non-commercial research"
    commercial = False
    home = "github.com/BryanPlummer/flickr30k_entities; pictures on request"
    # Sizes: the files themselves, in the repository.
    files = (
        File("annotations.zip", 0, "Annotations and Sentences: 31,783 pictures, 158,915 captions"),
        File("UNRELATED_CAPTIONS", 303, "21 captions to leave out", exact=True),
        File("flickr30k_entities/train.txt", 320_344, "ids", exact=True),
        File("flickr30k_entities/val.txt", 10_758, "1,000 ids, held out", exact=True),
        File("flickr30k_entities/test.txt", 10_733, "1,000 ids, held out", exact=True),
    )
    image_folders = (FLICKR30K,)
    style = "base"
    reads_folders = True
    Options = SplitOptions

    def __init__(self, entry: SourceEntry) -> None:
        super().__init__(entry)
        self._found: list[Path] | None = None

    def inputs(self) -> list[Path]:
        """Every file that is read, in a stable order."""
        if self._found is not None:
            return self._found
        found: set[Path] = set()
        for path in super().inputs():
            if not path.is_dir():
                found.add(require_file(path))
                continue
            found |= {p for p in path.rglob("*") if p.is_file() and _role(p)}
        if not any(_role(path) == "sentences" for path in found):
            given = ", ".join(map(str, self.entry.annotations))
            raise DataError(f"{given}: holds no Sentences/*.txt; expected flickr30k_entities")
        self._found = sorted(found, key=lambda path: (path.parts[-2:], str(path)))
        return self._found

    def batches(self, finder: ImageFinder) -> Iterator[Batch]:
        """Sentences, one record each, with the boxes of their picture."""
        by_role: dict[str, list[Path]] = {}
        for path in self.inputs():
            by_role.setdefault(_role(path), []).append(path)
        lists = SplitLists(by_role.get("list", ()))
        unrelated = {key for path in by_role.get("unrelated", ()) for key in _unrelated(path)}
        annotations = {path.stem: path for path in by_role.get("annotations", ())}
        rows: list[Any] = []
        start = 0
        for path in by_role["sentences"]:
            picture: dict[str, Any] = {"id": path.stem, "split": lists.of(path.stem)}
            picture["split_known"] = lists.known
            picture |= _boxes(annotations.pop(path.stem, None))
            if picture.get("sides", ()) is None:
                picture["sides"], reason = look_up_size(finder, f"{path.stem}.jpg")
                picture |= {"problem": reason} if reason else {}
            lines = _lines(path)
            for number, line in enumerate(lines):
                dropped = (path.stem, number) in unrelated or (path.stem, None) in unrelated
                rows.append({**picture, "number": number, "sentence": line, "unrelated": dropped})
            if len(rows) >= ROWS:
                yield Batch("Sentences", start, rows)
                start, rows = start + len(rows), []
        rows += [{"id": stem, "alone": True} for stem in sorted(annotations)]
        yield Batch("Sentences", start, rows)

    def draft(self, record: Any, notes: Counter[str]) -> Draft | str:
        """Understands one sentence; see `Source.draft`."""
        if "alone" in record:
            return "annotation_without_sentences"
        split = record["split"]
        if split is None and not record["split_known"]:
            notes["split_unknown"] += 1
        elif split not in self.options.splits:
            return "split_missing" if split is None else "held_out_split"
        if record["unrelated"]:
            return "unrelated_caption"
        if "problem" in record:
            return str(record["problem"])
        sentence = _ground(record["sentence"], record["boxes"], record["sides"])
        if isinstance(sentence, str):
            return sentence
        (text, boxes) = sentence
        if not boxes:
            notes["sentence_without_box"] += 1
        request = choose(GROUNDED_REQUESTS if boxes else REQUESTS, text)
        meta = {"split": split} if split not in ("train", None) else {}
        image, identity = f"{record['id']}.jpg", f"{record['id']}#{record['number']}"
        return self.short(request, text, image, notes, orig_id=identity, meta=meta)


def _role(path: Path) -> str:
    """What a file of the repository is for; empty for others."""
    if path.name.startswith("."):
        return ""
    folder, name = path.parent.name, path.name
    if folder == "Sentences" and path.suffix == ".txt":
        return "sentences"
    if folder == "Annotations" and path.suffix == ".xml":
        return "annotations"
    if name.startswith("UNRELATED_CAPTIONS"):
        return "unrelated"
    return "list" if is_split_list(path) else ""


def _text(path: Path) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; fetch it again") from None


def _lines(path: Path) -> list[str]:
    """The sentences of a picture.

    Raises:
        DataError: The last one breaks off inside a phrase.
    """
    lines = _text(path).split("\n")
    last = lines.pop()  # empty, unless the last line has no end
    if "[/EN#" in _PHRASE.sub("", last):
        raise DataError(
            f"{path}:{len(lines) + 1}: the file ends at byte {path.stat().st_size} inside a "
            "phrase; it is truncated: unpack it again"
        )
    return [*lines, last] if last or not lines else lines


def _unrelated(path: Path) -> Iterator[tuple[str, int | None]]:
    """Captions to leave out: a picture's id, with or without .jpg, and the caption's number.

    The released list counts captions from one; a list written as the captions' own file is,
    `1.jpg#0`, or with a 0 anywhere, counts from zero.

    Raises:
        DataError: With file and line, where a line has no id.
    """
    pairs: list[tuple[str, int | None]] = []
    first = 1
    for number, line in enumerate(_text(path).splitlines(), start=1):
        match = re.match(r"\s*(\d+)(?:\.jpg)?(?:[#\s,_]+(\d{1,9}))?", line)
        if match:
            first = 0 if "#" in line or match[2] == "0" else first
            pairs.append((match[1], int(match[2]) if match[2] else None))
        elif line.strip() and number > 1 and not line.startswith("#"):
            raise DataError(f"{path}:{number}: expected a picture's id, found {line[:40]!r}")
    return ((stem, None if n is None else n - first) for stem, n in pairs)


def _boxes(path: Path | None) -> dict[str, Any]:
    """The picture's sides and the boxes of each chain.

    Raises:
        DataError: The file is no XML, with the byte; or it defines entities.
    """
    if path is None:
        return {"problem": "annotation_missing"}
    raw = path.read_bytes()
    try:
        root = fromstring(raw, forbid_dtd=True)
    except ParseError as error:
        line, column = error.position
        byte = sum(len(part) + 1 for part in raw.split(b"\n")[: line - 1]) + column
        raise DataError(
            f"{path}: not valid XML at byte {byte} of {len(raw)} ({error}); "
            "the file is broken or truncated: unpack it again"
        ) from None
    except (DefusedXmlException, ValueError, LookupError) as error:
        raise DataError(f"{path}: refused, it is no plain XML ({error!r:.80})") from None
    sides = picture_size(_side(root, "width"), _side(root, "height"))
    boxes: dict[str, list[Corners | str]] = {}
    for item in root.iter("object"):
        for bound in item.iter("bndbox"):
            found = [_number(bound.findtext(k)) for k in ("xmin", "ymin", "xmax", "ymax")]
            for chain in item.iter("name"):
                boxes.setdefault((chain.text or "").strip(), []).append(corners(found))
    return {"sides": sides, "boxes": boxes}


def _side(root: Any, name: str) -> float | None:
    return _number(root.findtext(f"size/{name}"))


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _ground(
    sentence: str, boxes: dict[str, list[Corners | str]], sides: tuple[float, float]
) -> tuple[str, int] | str:
    """The sentence with boxes behind its phrases and how many have some, or a reason."""
    parts: list[str] = []
    end = grounded = 0
    for match in _PHRASE.finditer(sentence):
        parts += [sentence[end : match.start()], match[2].strip()]
        end = match.end()
        if match[1] in boxes:
            good = [box for box in boxes[match[1]] if not isinstance(box, str)]
            bad = [box for box in boxes[match[1]] if isinstance(box, str)]
            place = bad[0] if bad else box_text(good, *sides)
            if not place.startswith("[["):
                return place
            parts.append(f" {place}")
            grounded += 1
    parts.append(sentence[end:])
    if any("/EN#" in part for part in parts):
        return "markup_broken"
    return "".join(parts), grounded


SOURCE = Flickr30kEntities

if __name__ == "__main__":
    from data_builders.script import run_source

    run_source("flickr30k_entities")
