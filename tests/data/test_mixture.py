"""The data set: what it holds, how it repeats, and that bad data ends it before training."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from cogvlm_sft import DataError
from cogvlm_sft.data.collator import CogVLMCollator
from cogvlm_sft.data.mixture import ConversationDataset
from cogvlm_sft.data.pictures import check_picture, read_picture
from cogvlm_sft.model import CogVLMProcessor

About = Callable[..., dict[str, Any]]
WriteBuild = Callable[..., Path]


@pytest.fixture
def build(write_build: WriteBuild, about: About) -> Path:
    return write_build(
        about("red.png", ("What colour?", "Red."), ("Sure?", "是的.")),
        about("blue.png", ("What colour?", "Blue.")),
        {"rounds": [("Hi.", "Hello.")], "style": "text"},
    )


def test_items_and_batches(build: Path, image_root: Path, processor: CogVLMProcessor) -> None:
    dataset = ConversationDataset([(build, 1.0)], processor, image_root)
    assert len(dataset) == 3 and len(list(dataset)) == 3
    assert dataset.lengths == [len(item["input_ids"]) for item in dataset]
    red, blue, text = list(dataset)
    assert red["images"].shape == (1, 3, 28, 28) and text["images"].shape == (0, 3, 28, 28)
    with Image.open(image_root / "blue.png") as picture:
        expected = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    assert torch.equal(blue["images"], expected)

    collator = CogVLMCollator(processor)
    batch = collator([red, text, blue])
    longest = max(dataset.lengths)
    for name in ("input_ids", "attention_mask", "token_type_ids", "labels"):
        assert batch[name].shape == (3, longest) and batch[name].dtype == torch.int64
    for row, item in enumerate([red, text, blue]):
        width = len(item["input_ids"])
        assert batch["attention_mask"][row].tolist() == [1] * width + [0] * (longest - width)
        assert batch["labels"][row].tolist() == item["labels"] + [-100] * (longest - width)
        assert batch["token_type_ids"][row, width:].sum() == 0
    assert torch.equal(batch["pixel_values"], torch.cat([red["images"], blue["images"]]))
    assert "pixel_values" not in collator([text, text])


def test_a_batch_without_a_supervised_token_is_an_error(
    build: Path, image_root: Path, processor: CogVLMProcessor
) -> None:
    item = dict(ConversationDataset([(build, 1.0)], processor, image_root)[0])
    item["labels"] = [item["input_ids"][0], *[-100] * (len(item["labels"]) - 1)]
    with pytest.raises(DataError, match=r"2 row\(s\) has no supervised token"):
        CogVLMCollator(processor)([item, item])


def test_workers_read_the_same(build: Path, image_root: Path, processor: CogVLMProcessor) -> None:
    dataset = pickle.loads(pickle.dumps(ConversationDataset([(build, 1.0)], processor, image_root)))
    loader = DataLoader(dataset, batch_size=3, collate_fn=CogVLMCollator(processor))
    (alone,) = list(loader)
    (worked,) = list(DataLoader(dataset, 3, collate_fn=CogVLMCollator(processor), num_workers=1))
    assert alone.keys() == worked.keys()
    assert all(torch.equal(alone[name], worked[name]) for name in alone)


def test_weights_repeat_a_source(
    write_build: WriteBuild, about: About, image_root: Path, processor: CogVLMProcessor
) -> None:
    many = write_build(*[about("red.png", ("Which?", f"{i}.")) for i in range(10)], name="many")
    few = write_build(about("blue.png", ("Which?", "Blue.")), name="few")

    def epoch(weight: float, seed: int = 0) -> list[str]:
        dataset = ConversationDataset(
            [(many, weight), (few, 2.0)], processor, image_root, seed=seed
        )
        return [dataset.conversation(index)[0].id for index in range(len(dataset))]

    everything = [f"many:{i}" for i in range(10)]
    assert epoch(1.0) == [*everything, "few:0", "few:0"]
    part = epoch(0.3)[:-2]
    assert len(part) == len(set(part)) == 3 and set(part) <= set(everything)
    assert epoch(0.3)[:-2] == part != epoch(0.3, seed=1)[:-2]
    assert epoch(2.5)[:20] == everything * 2 and len(epoch(2.5)) == 27
    with pytest.raises(DataError, match="weight is 0"):
        epoch(0.0)


def test_report_counts_splits_and_drops(
    write_build: WriteBuild, about: About, image_root: Path, processor: CogVLMProcessor
) -> None:
    build = write_build(
        about("red.png", ("A?", "Red."), ("B?", "Sure."), ("C?", "Yes.")),
        about("blue.png", ("A?", "word " * 80)),
        about("blue.png", ("A?", "Blue.")),
    )
    dataset = ConversationDataset([(build, 2.0)], processor, image_root, max_length=24)
    (source,) = dataset.report.sources
    assert (source.conversations, source.rows, source.split, source.dropped) == (3, 4, 1, 1)
    assert source.dropped_rounds == 1 and source.tokens == sum(dataset.lengths) / 2
    assert dataset.report.rows == len(dataset) == 8
    assert dataset.report.conversations == 3 and dataset.report.dropped == 1
    answers = [
        processor.tokenizer.decode([label for label in item["labels"] if label not in (-100, 2)])
        for item in dataset
    ]
    assert answers == ["Red.", "Sure.", "Yes.", "Blue."] * 2
    printed = str(dataset.report)
    assert "an epoch has 8 rows" in printed and "1 rounds are longer" in printed
    with pytest.raises(DataError, match="no row to train on; 3 conversation"):
        ConversationDataset([(build, 1.0)], processor, image_root, max_length=9)


def test_a_file_and_blank_lines(build: Path, image_root: Path, processor: CogVLMProcessor) -> None:
    file = build / "conversations-00000-of-00001.jsonl"
    file.write_text("\n\n" + file.read_text("utf-8").replace("\n", "\n\n"), "utf-8")
    dataset = ConversationDataset([(file, 1.0)], processor, image_root)
    where = [dataset.conversation(index)[1] for index in range(3)]
    assert where == [f"{file}:{line} (build:{i})" for i, line in enumerate([3, 5, 7])]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"images": ["gone.png"]}, r"jsonl:2 \(build:1\): image 'gone.png' is missing under"),
        ({"images": ["../secret.png"]}, r"jsonl:2 \(build:1\).*leaves the image root"),
        ({"images": []}, r"jsonl:2 \(build:1\): 1 <image> marker\(s\).* 0 image"),
        ({"messages": [{"role": "user", "content": "Hi."}], "images": []}, r"jsonl:2.*assistant"),
        (
            {"messages": [{"role": "user", "content": "<image>"},
                          {"role": "assistant", "content": "A", "train": False}]},
            r"jsonl:2 \(build:1\): .*train: false",
        ),
    ],
)  # fmt: skip
def test_bad_records_end_before_training(
    write_build: WriteBuild,
    about: About,
    image_root: Path,
    processor: CogVLMProcessor,
    changes: dict[str, Any],
    message: str,
) -> None:
    build = write_build(
        about("red.png", ("A?", "Red.")), about("red.png", ("A?", "Red."), **changes)
    )
    with pytest.raises(DataError, match=message):
        ConversationDataset([(build, 1.0)], processor, image_root)


def test_max_length_below_a_picture(
    build: Path, image_root: Path, processor: CogVLMProcessor
) -> None:
    with pytest.raises(DataError, match=r"jsonl:1 .*max_length is 7, but one image takes 6 tokens"):
        ConversationDataset([(build, 1.0)], processor, image_root, max_length=7)


@pytest.mark.parametrize("name", ["red.png", "large.jpg", "small.jpg", "large.png", "text.png"])
def test_a_damaged_picture_ends_before_training(
    write_build: WriteBuild,
    about: About,
    image_root: Path,
    processor: CogVLMProcessor,
    name: str,
) -> None:
    path = image_root / name
    if name == "small.jpg":
        Image.new("RGB", (90, 90), "red").save(path)
    elif name == "large.png":
        with Image.open(image_root / "large.jpg") as picture:
            picture.save(path)
    elif name == "text.png":
        path.write_text("no picture")
    if name != "text.png":
        check_picture(path, "here")
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    build = write_build(about(name, ("A?", "Red.")))
    with pytest.raises(DataError, match=rf"jsonl:1 \(build:0\): image .*{name} cannot be decoded"):
        ConversationDataset([(build, 1.0)], processor, image_root)


def test_a_picture_damaged_later_is_named_when_it_is_read(
    build: Path, image_root: Path, processor: CogVLMProcessor
) -> None:
    dataset = ConversationDataset([(build, 1.0)], processor, image_root)
    (image_root / "blue.png").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"jsonl:2 \(build:1\): image .*blue.png cannot be decoded"):
        dataset[1]


def test_pictures_are_read_upright(image_root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10), "red").save(image_root / "phone.jpg", exif=exif)
    picture = read_picture(image_root / "phone.jpg", "here")
    assert picture.size == (10, 20) and np.asarray(picture).shape == (20, 10, 3)
