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
    """One question a picture, from COCO's, Karpathy's or TextCaps' file."""
    path = one_file(paths, "captioning")
    content = load_json(path)
    if "annotations" in content and "images" in content:
        found = _coco(content)
    elif "data" in content:
        found = _textcaps(content["data"])
    elif "images" in content:
        found = _karpathy(content["images"])
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


def _coco(content: dict[str, Any]) -> list[_Row]:
    captions: dict[Any, list[str]] = {}
    for row in content["annotations"]:
        captions.setdefault(row["image_id"], []).append(row["caption"])
    return [
        (
            picture["id"],
            field_of(picture, "file_name", f"picture {picture['id']}"),
            captions.get(picture["id"], []),
            picture.get("domain", ""),
        )
        for picture in content["images"]
    ]


def _karpathy(pictures: list[dict[str, Any]]) -> list[_Row]:
    return [
        (
            picture.get("cocoid", picture["filename"]),
            "/".join(filter(None, (picture.get("filepath"), picture["filename"]))),
            [sentence["raw"] for sentence in picture["sentences"]],
            "",
        )
        for picture in pictures
        if picture["split"] == "test"
    ]


def _textcaps(records: list[dict[str, Any]]) -> list[_Row]:
    captions: dict[str, list[str]] = {}
    for row in records:
        known = captions.setdefault(row["image_id"], [])
        if "caption_str" in row:
            known.append(row["caption_str"])
    return [(identity, f"{identity}.jpg", found, "") for identity, found in captions.items()]


def _score(questions: Sequence[Question], answers: Sequence[str]) -> Scores:
    predictions = [tokenize(answer) for answer in answers]
    references = [[tokenize(caption) for caption in question.truth] for question in questions]
    cider = cider_d(predictions, references)
    counts = bleu_counts(predictions, references)
    figures = [
        Figure("CIDEr", mean_of(cider)),
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
        figures.append(Figure(f"CIDEr, {domain}", mean_within(cider, domains, domain)))
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
    _task("nocaps", "NoCaps", "nocaps_val_4500_captions.json", published.NOCAPS),
    _task("flickr30k", "Flickr30k", "dataset_flickr30k.json (Karpathy's split; test)",
          published.FLICKR30K),
    _task("coco_captions", "COCO captions",
          "dataset_coco.json (Karpathy's split; test) or captions_val2014.json", published.COCO),
    _task("textcaps", "TextCaps", "TextCaps_0.1_val.json", published.TEXTCAPS),
)  # fmt: skip
