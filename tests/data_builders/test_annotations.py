"""The streaming readers: every shape, every cut, and the byte in every message."""

import io
import itertools
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvlm_sft.errors import DataError
from data_builders import annotations
from data_builders.annotations import read_head, read_mapping, read_records
from data_builders.json_object import LoneSurrogates


def read_all(path, wrappers=()):
    batches = list(read_records(path, wrappers))
    for before, after in itertools.pairwise(batches):
        assert after.start == before.start + len(before.records)
    assert not batches or batches[0].start == 0
    for batch in batches:
        if batch.raw is not None:
            assert json.loads(batch.raw) == batch.records
    return [record for batch in batches for record in batch.records]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=12)
    | st.sampled_from(['},{"a"', '"', "\\", "[{", "}]", "猫🐱", "\u2028"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["a", "b", "from", '},{"a":1'] ), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=120)
@given(
    records=st.lists(VALUES, max_size=12),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
)
def test_any_array_is_read_whole_at_any_chunk_size(
    records, indent, ascii_only, chunk, tmp_path_factory
):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotations, "CHUNK", chunk)
        assert read_all(path) == records


@settings(max_examples=80)
@given(cut=st.integers(1, 10_000), chunk=st.sampled_from([7, 60, 4096]))
def test_a_cut_array_names_where_the_file_ends(cut, chunk, tmp_path_factory):
    records = [
        {"id": f"{n}", "conversations": [{"from": "human", "value": 'a "b" }, {'}] * (n % 3)}
        for n in range(20)
    ]
    whole = json.dumps(records).encode()
    cut = 1 + cut % (len(whole) - 1)
    path = tmp_path_factory.mktemp("cut") / "a.json"
    path.write_bytes(whole[:cut])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotations, "CHUNK", chunk)
        with pytest.raises(DataError, match=rf"byte {cut}\b.*truncated"):
            read_all(path)


def test_a_syntax_error_names_its_byte(tmp_path):
    text = '[{"a": 1}, {"a": 2}, {"a" 3}, {"a": 4}]'
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_all(path)
    named = int(re.search(r"byte (\d+)", str(caught.value)).group(1))
    assert abs(named - text.index(" 3}")) <= 1


@pytest.mark.parametrize(
    "content, complaint",
    [
        (b"", "empty"),
        (b"  \n", "nothing but white space"),
        (b"hello", "found byte b'h' at byte 0"),
        (b'[{"a": 1}] x', r"byte \d+"),
        (b'[{"a": 1}]]', r"byte \d+"),
        (b'[{"a": "\xff"}]', "byte 8"),
        (b'{"rows": [1]}', r"expected a JSON array, found an object with keys \['rows'\]"),
        (b'{"annotations": [1, 2', "where the file ends"),
        (b'{"a": [], "rows": null, "b": 1}', r"found an object with keys \['a', 'rows', 'b'\]"),
        (b'{"a": 1}\n{"a": 2}\n{"a"', r"a.json:3: not valid JSON at byte \d+"),
        (b"[" * 100_000, "byte"),
    ],
)
def test_broken_files(content, complaint, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=complaint):
        read_all(path)


@settings(max_examples=60)
@given(content=st.binary(max_size=60))
def test_garbage_never_ends_in_another_error(content, tmp_path_factory):
    path = tmp_path_factory.mktemp("garbage") / "a.json"
    for head in (b"", b"[", b'{"annotations": ['):
        path.write_bytes(head + content)
        try:
            read_all(path, ("annotations",))
        except DataError as error:
            assert "a.json" in str(error)


def test_wrapped_lines_mark_and_surrogate(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf {"info": 1, "annotations": [{"x": 1.5}, 2]}')
    assert read_all(path, ("data", "annotations")) == [{"x": 1.5}, 2]
    path.write_text('{"annotations": []}')
    assert read_all(path, ("annotations",)) == []
    for value in ("null", '{"a": 1}', '"text"', "3"):
        path.write_text(f'{{"info": [], "annotations": {value}}}')
        with pytest.raises(DataError, match='expected an array under "annotations", found '):
            read_all(path, ("annotations",))
    path.write_text('{"a": 1}\n\n{"a": 2}\n')
    assert read_all(path) == [{"a": 1}, {"a": 2}]
    path.write_text(r'[{"a": "\ud83d"}, {"a": NaN}]')  # orjson refuses both
    assert read_all(path)[0] == {"a": "\ud83d"}


@settings(max_examples=200)
@given(
    texts=st.lists(st.text(st.sampled_from("a\\u\ud83d\udc31\ue000d8"), max_size=8), max_size=6),
    size=st.integers(1, 40),
)
def test_halves_of_surrogate_pairs_become_nul(texts, size):
    raw = json.dumps(texts).encode()
    stream, given_out = LoneSurrogates(io.BytesIO(raw)), b""
    while part := stream.read(size):
        given_out += part
    read = json.loads(given_out)
    assert len(given_out) == len(raw)
    for text, found in zip(texts, read, strict=True):
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        assert ("\0" in found) == ("\ufffd" in whole)
        assert "\ufffd" in whole or found == whole


@pytest.mark.parametrize("odd", ["1", "NaN", "-Infinity", "1e999", '"a\tb\x01"', '"\\ud83d"'])
def test_odd_values_in_an_object_are_read_as_in_an_array(odd, tmp_path):
    path = tmp_path / "a.json"
    record = f'{{"a": 1, "b": {odd}}}'
    path.write_text(f"[{record}, 2]")
    expected = repr(read_all(path)).replace("\\ud83d", "\\x00")
    path.write_text(f'{{"info": {{}}, "data": [{record}, 2], "tail": {record}}}')
    assert repr(read_all(path, ("data",))) == expected
    path.write_text(f'{{"x": {record}, "x": 2}}')  # a key that is there twice
    pairs = list(read_mapping(path))
    assert [key for key, _ in pairs] == ["x", "x"] and repr([v for _, v in pairs]) == expected


def test_a_broken_object_names_its_byte(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"data": [{"a": 1}, {"a" 2}], "b": 1}')
    with pytest.raises(DataError, match="not valid JSON at byte 25 "):
        read_all(path, ("data",))
    path.write_bytes(b'{"data": [{"a": "\xff"}]}')
    with pytest.raises(DataError, match="not valid JSON at byte 17 "):
        read_all(path, ("data",))
    path.write_text('{"data": [NaN, ' + "9" * 5000 + ', {"a":')
    with pytest.raises(DataError, match=r"byte \d+"):
        read_all(path, ("data",))


@pytest.mark.parametrize(
    "text, records",
    [
        ('null\n{"a": 1}\n', [None, {"a": 1}]),
        ('["a"]\n{"a": 1}', [["a"], {"a": 1}]),
        ('{"a": NaN2}', None),
        ('[{"a": 1},\n {"a": 2}]', [{"a": 1}, {"a": 2}]),
        ('[{"a": 1}]\n', [{"a": 1}]),
        ('\r\n{"a": 1}\r\n\r\n"b"', [{"a": 1}, "b"]),
        ('{"a": 1e400}\n{"a": 2}', [{"a": float("inf")}, {"a": 2}]),
    ],
)
def test_lines_and_arrays_are_told_apart(text, records, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(text.encode())
    if records is None:
        with pytest.raises(DataError, match=r"a\.jsonl:1: not valid JSON at byte 9 "):
            read_all(path)
    else:
        assert read_all(path) == records


def test_a_value_at_the_head_or_behind_the_arrays(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"data_subtype": "val2014", "annotations": [1]}')
    assert read_head(path, "data_subtype") == "val2014"
    path.write_text('{"annotations": [{"data_subtype": "no"}, NaN], "data_subtype": "val2014"}')
    assert read_head(path, "data_subtype") is None
    assert read_head(path, "data_subtype", whole=True) == "val2014"
    assert read_head(path, "other", whole=True) is None


def test_mapping(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"B0": {"split": 1}, "B1": [1.5]}')
    assert list(read_mapping(path)) == [("B0", {"split": 1}), ("B1", [1.5])]
    path.write_text('{"B0": {"split": 1}, "B1": [1')
    with pytest.raises(DataError, match="byte 29, where the file ends"):
        list(read_mapping(path))
    path.write_text("[1]")
    with pytest.raises(DataError, match="expected a JSON object"):
        list(read_mapping(path))


def test_missing_and_folder(tmp_path: Path):
    with pytest.raises(DataError, match="no such annotation file"):
        read_all(tmp_path / "no.json")
    with pytest.raises(DataError, match="is a folder"):
        read_all(tmp_path)
