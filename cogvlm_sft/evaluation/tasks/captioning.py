"""Captioning: NoCaps (by domain), Flickr30k, COCO, TextCaps.

A caption is asked for with the picture alone: the released `base` template and no words, which is
how the released base model was trained to caption; the authors' prompt for these figures was never
published (THUDM/CogVLM issue 76). All references of a picture are used. The figures are those of
the official scorer, times 100 as in papers. CIDEr of a NoCaps domain is the mean over its pictures
with the document frequencies of the whole set, which is what the benchmark's server does: in the
rows that papers print from it, the overall figure is the mean of the domains' by their numbers of
pictures (648, 2,938 and 914) to the last digit. Scripts that score each domain's file by itself
give other figures.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogvlm_sft.errors import DataError
from cogvlm_sft.evaluation.metrics.captions import bleu, bleu_counts, cider_d, rouge_l, tokenize
from cogvlm_sft.evaluation.metrics.intervals import Figure, Statistic, mean_of, mean_within
from cogvlm_sft.evaluation.metrics.meteor import meteor, meteor_counts
from cogvlm_sft.evaluation.tasks import published
from cogvlm_sft.evaluation.tasks.task import (
    Pictures,
    Question,
    Scores,
    Task,
    field_of,
    load_json,
    one_file,
    rows_with,
)


def _read(paths: Sequence[Path], images: Path) -> list[Question]:
    """One question a picture, from COCO's, Karpathy's or TextCaps' file.

    The files of hidden test splits (`image_info_test2014.json`, `nocaps_test_image_info.json`) are
    COCO's without annotations.
    """
    path = one_file(paths, "captioning")
    content, where = load_json(path, dict), str(path)
    if "data" in content:
        found = _textcaps(field_of(content, "data", where, list), where)
    elif "images" in content:
        pictures_told = field_of(content, "images", where, list)
        if any(isinstance(one, dict) and "sentences" in one for one in pictures_told):
            found = _karpathy(pictures_told, where)
        else:
            found = _coco(pictures_told, content, where)
    else:
        raise DataError(
            f"{path}: expected images and annotations (COCO, NoCaps), images with sentences "
            f"(Karpathy's split) or data (TextCaps), found {sorted(content)[:5]}"
        )
    if not found:
        raise DataError(f"{path}: holds no picture of the test part")
    pictures = Pictures(images)
    return [
        Question(
            id=str(identity),
            images=(pictures.find(name, where=f"picture {identity}"),),
            text="",
            style="base",
            truth=captions or None,
            shown=" / ".join(captions[:3]),
            group=domain,
            upload={"image_id": identity},
        )
        for identity, name, captions, domain in found
    ]


_Row = tuple[Any, str, list[str], str]


def _coco(pictures: list[Any], content: dict[str, Any], where: str) -> list[_Row]:
    captions: dict[Any, list[str]] = {}
    if "annotations" in content:
        for row in field_of(content, "annotations", where, list):
            known = captions.setdefault(field_of(row, "image_id", where, int, str), [])
            known.append(field_of(row, "caption", where, str))
    rows = []
    for picture in pictures:
        identity = field_of(picture, "id", where, int, str)
        name = field_of(picture, "file_name", f"{where}: picture {identity}", str)
        rows.append((identity, name, captions.get(identity, []), str(picture.get("domain") or "")))
    return rows


def _karpathy(pictures: list[Any], where: str) -> list[_Row]:
    rows = []
    for picture in pictures:
        if field_of(picture, "split", where) != "test":
            continue
        name = field_of(picture, "filename", where, str)
        sentences = field_of(picture, "sentences", f"{where}: {name}", list)
        captions = [field_of(one, "raw", f"{where}: {name}", str) for one in sentences]
        folder = picture.get("filepath")
        rows.append(
            (picture.get("cocoid", name), f"{folder}/{name}" if folder else name, captions, "")
        )
    return rows


def _textcaps(records: list[Any], where: str) -> list[_Row]:
    captions: dict[str, list[str]] = {}
    for row in records:
        known = captions.setdefault(field_of(row, "image_id", where, str), [])
        if "caption_str" in row:
            known.append(field_of(row, "caption_str", where, str))
    return [(identity, f"{identity}.jpg", found, "") for identity, found in captions.items()]


def _score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    predictions = [tokenize(answer) for answer in answers]
    references = [[tokenize(caption) for caption in question.truth] for question in questions]
    cider = cider_d(predictions, references)
    counts = bleu_counts(predictions, references)
    figures = [
        Figure("CIDEr", mean_of(cider), share=False),
        *(Figure(f"BLEU-{n + 1}", _bleu(counts, n)) for n in range(4)),
        Figure("ROUGE-L", mean_of(rouge_l(predictions, references))),
    ]
    notes = []
    try:
        rows = meteor_counts(predictions, references)
        figures.append(Figure("METEOR", lambda chosen: meteor(rows[chosen])))
    except DataError as error:
        notes.append(f"{error}; it is not computed.")
    domains = [question.group for question in questions]
    for domain in sorted(set(domains) - {""}):
        within = mean_within(cider, domains, domain)
        figures.append(Figure(f"CIDEr, {domain}", within, share=False))
    # CIDEr is between 0 and 10; a perfect caption of many references stays well below 10.
    return Scores(figures, np.clip(cider / 2, 0, 1).tolist(), notes)


def _bleu(counts: NDArray[np.int64], order: int) -> Statistic:
    return lambda chosen: bleu(counts[chosen])[order]


def _task(name: str, title: str, files: str, figures: tuple[published.Published, ...]) -> Task:
    domains = (
        "; CIDEr of a domain with the document frequencies of the whole set, as on EvalAI"
        if name == "nocaps"
        else ""
    )
    return Task(
        name, title, files, _read, "the picture and no words, base template",
        "ends stripped; PTB tokens of Stanford CoreNLP 3.4.1, lower case, punctuation dropped",
        "CIDEr-D, BLEU-1 to 4, ROUGE-L, METEOR where Java is, times 100; not SPICE" + domains,
        _score, 64, published=figures,
        upload_name=f"{name}_results.json", upload=rows_with("caption"),
    )  # fmt: skip


TASKS = (
    _task("nocaps", "NoCaps", "nocaps_val_4500_captions.json or nocaps_test_image_info.json",
          published.NOCAPS),
    _task("flickr30k", "Flickr30k", "dataset_flickr30k.json (Karpathy's split; test)",
          published.FLICKR30K),
    _task("coco_captions", "COCO captions",
          "dataset_coco.json (Karpathy's split; test) or captions_val2014.json", published.COCO),
    _task("textcaps", "TextCaps", "TextCaps_0.1_val.json", published.TEXTCAPS),
)  # fmt: skip
