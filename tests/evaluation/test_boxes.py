"""Boxes worked out by hand, and their properties on generated ones."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvlm_sft.evaluation.metrics.boxes import (
    box_match,
    intersection_over_union,
    merge_boxes,
    parse_boxes,
    to_pixels,
    write_box,
)


def _ordered(values: tuple[int, int, int, int]) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = values
    return min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)


coordinate = st.integers(0, 999)
box = st.tuples(coordinate, coordinate, coordinate, coordinate).map(_ordered)


def test_boxes_of_one_thing_are_parsed_and_merged() -> None:
    found = parse_boxes("The dogs [[010,020,030,040;050,060,070,080]] sit.")
    assert found == [(10, 20, 30, 40), (50, 60, 70, 80)]
    assert merge_boxes(found) == (10, 20, 70, 80)


@pytest.mark.parametrize(
    "text", ["", "red", "[[1,2,3]]", "[[1,2,3,4", "[[1,2,3,4;5,6]]", "[[1,2,3,4000]]", "[1,2,3,4]"]
)
def test_what_is_no_box_gives_none_and_counts_as_wrong(text: str) -> None:
    assert parse_boxes(text) == []
    assert box_match(text, "[[000,000,500,500]]") is False


def test_a_swapped_corner_is_put_in_order() -> None:
    assert parse_boxes("[[300,400,100,200]]") == [(100, 200, 300, 400)]


def test_overlap_of_exactly_one_half_is_a_miss() -> None:
    # 100 x 100 inside 100 x 200: the overlap is exactly one half.
    assert intersection_over_union((0, 0, 100, 100), (0, 0, 100, 200)) == 0.5
    assert box_match("[[000,000,100,100]]", "[[000,000,100,200]]") is False
    assert box_match("[[000,000,100,101]]", "[[000,000,100,200]]") is True


def test_a_true_answer_without_a_box_is_an_error() -> None:
    with pytest.raises(ValueError, match="holds no box"):
        box_match("[[000,000,100,100]]", "red")


@given(box, box)
def test_overlap_is_symmetric_and_between_zero_and_one(
    one: tuple[float, float, float, float], other: tuple[float, float, float, float]
) -> None:
    overlap = intersection_over_union(one, other)
    assert 0 <= overlap <= 1
    assert overlap == intersection_over_union(other, one)


@given(box)
def test_a_box_overlaps_itself_wholly(one: tuple[float, float, float, float]) -> None:
    empty = one[0] == one[2] or one[1] == one[3]
    assert intersection_over_union(one, one) == (0 if empty else 1)


@given(st.lists(box, min_size=1, max_size=4))
def test_written_boxes_are_read_back(boxes: list[tuple[float, float, float, float]]) -> None:
    text = ";".join(",".join(f"{int(value):03d}" for value in one) for one in boxes)
    assert parse_boxes(f"[[{text}]]") == boxes
    merged = merge_boxes(boxes)
    assert merged is not None
    assert all(intersection_over_union(one, merged) <= 1 for one in boxes)
    assert all(merged[0] <= one[0] and one[2] <= merged[2] for one in boxes)


def test_a_box_in_pixels_is_written_as_thousandths_and_read_back() -> None:
    text = write_box((64, 48, 320, 480), 640, 480)
    assert text == "[[100,100,500,999]]"
    assert to_pixels(parse_boxes(text)[0], 640, 480) == pytest.approx((64, 48, 320, 479.52))
