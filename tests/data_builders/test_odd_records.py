"""Any JSON value where a record is expected: kept, or dropped by name; never a crash."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_builders.annotations import Batch
from data_builders.images import ImageFinder
from data_builders.recipe import SourceEntry, source_names
from data_builders.source import RecordStage, load_source

KEYS = [
    "id", "image", "conversations", "messages", "turns", "from", "value", "role", "content",
    "image_id", "question", "answer", "answers", "task", "set_name", "question_id", "style",
    "choices", "hint", "split", "multiple_choice_answer", "imageId", "captions",
]  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats()
    | st.text(max_size=6) | st.sampled_from(["human", "gpt", "user", "<image>", "</s>", "\ud83d"])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    ),
    max_leaves=20,
)
# Sources that join or unfold files hand rows of their own to `draft`; the foreign part is inside.
ROW = {"image": "1.jpg", "split": "train", "id": 1}
WRAP = {
    **dict.fromkeys(
        ["vqav2", "okvqa", "tdiuc"],
        lambda v: {"question": v, "asked_about": v, "answer": v if type(v) is dict else {},
                   "split": "train2014", "image": v},
    ),
    **dict.fromkeys(
        ["coco_captions", "flickr30k", "nocaps", "textcaps"],
        lambda v: ROW | {"caption": v, "image": v},
    ),
    "visual7w": lambda v: ROW | {"question": v, "answer": v, "box": v, "sides": (10.0, 10.0)},
    "refcoco": lambda v: ROW | {"expression": v, "box": v, "sized": True, "sides": (10.0, 10.0)},
    "flickr30k_entities": lambda v: ROW | {
        "split_known": True, "unrelated": False, "number": 0, "sentence": str(v), "boxes": {},
        "sides": (10.0, 10.0)},
    "gqa": lambda v: {"id": "1", "entry": v},
    "scienceqa": lambda v: {"id": "1", "entry": v},
    "cogvlm_sft_311k": lambda v: {"_stem": "1", "_folder": "f", "_label": v},
}  # fmt: skip


@pytest.mark.parametrize("name", [n for n in source_names() if n != "ocr_vqa"])
@settings(max_examples=60)
@given(values=st.lists(VALUES, max_size=4))
def test_odd_records(name, values, tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    source = load_source(name)(SourceEntry(source=name, name=name))
    stage = RecordStage(source, ImageFinder(root, [], must_exist=False), seed=0)
    wrap = WRAP.get(name, lambda value: value)
    done = stage.run(Batch("a.json", 0, [wrap(value) for value in values]))
    assert done.read == len(values) == len(done.lengths) + sum(done.drops.values())
    assert len(done.lines) == sum(done.lengths)


@settings(max_examples=60)
@given(key=st.text(max_size=4), value=VALUES)
def test_odd_entries_of_ocr_vqa(key, value, tmp_path_factory):
    from data_builders.sources.ocr_vqa import _questions

    source = load_source("ocr_vqa")(SourceEntry(source="ocr_vqa", name="ocr_vqa"))
    rows = _questions(key, value)
    assert rows
    for row in rows:
        assert source.draft(row, Counter()) is not None
