"""The report, looked at in a browser as a person would."""

import base64
import io
import re

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from cogvlm_sft.errors import DataError
from data_builders.thumbnail import boxes_in


@pytest.fixture
def built(root, picture, run, write_json):
    """A build with turns, drops, repairs and a near-duplicate."""
    smooth = Image.radial_gradient("L").crop((20, 60, 220, 220))
    smooth.save(root / "smooth.png")
    smooth.resize((180, 144)).save(root / "smooth_again.png")
    for number in range(6):
        picture(root / f"{number}.jpg", number, size=(120 + 40 * number, 100))
    rows = [
        {"image": f"{n % 7}.jpg", "turns": [
            {"role": "user", "content": f"What is {n}?"},
            {"role": "assistant", "content": f"number {n} of all</s>"},
            {"role": "user", "content": "Is it so?"}, {"role": "assistant", "content": "yes"}]}
        for n in range(42)
    ]  # fmt: skip
    rows += [
        {"image": name, "turns": [{"role": "user", "content": "Which shape?"},
                                  {"role": "assistant", "content": "A round one."}]}
        for name in ("smooth.png", "smooth_again.png")
    ]  # fmt: skip
    path = write_json("q.json", rows)
    return lambda **keys: run("custom_vqa", [path], deduplicate={"near": 6}, **keys)[2]


def test_what_a_person_sees(built, page, root):
    result = built()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((result.out / "report.html").as_uri())
    assert page.locator("h1").inner_text() == "37 conversations from 1 source"
    cards = dict(zip(page.locator(".card span").all_inner_texts(),
                     page.locator(".card b").all_inner_texts(), strict=True))  # fmt: skip
    assert cards["conversations"] == "37" and cards["questions with answers"] == "73"
    assert cards["dropped, 15.9 % of what was read"] == "7"
    drops = page.locator("#dropped ~ .panel summary").all_inner_texts()
    assert any("The picture is not on this disk" in text and "6" in text for text in drops)
    example = page.locator(".example").first
    assert not example.is_visible()
    page.locator("summary").first.click()
    assert example.is_visible() and "6.jpg" in example.inner_text()
    assert "control marker taken out of an answer × 42" in page.locator("main").inner_text()
    names = page.locator("figcaption b").all_inner_texts()
    assert names == [
        "Questions a conversation", "Characters an answer", "How questions begin",
        "Most frequent answers", "Longer side, pixels", "Width and height",
    ]  # fmt: skip
    answers = page.locator("figure", has_text="Most frequent").locator("tr").first.inner_text()
    assert answers.split() == ["yes", "49.3", "%"]  # 36 of 73
    pair = page.locator(".pair")
    assert pair.count() == 1 and "“Which shape? — A round one.”" in pair.inner_text()
    assert sorted(pair.locator(".mono").all_inner_texts()) == ["smooth.png", "smooth_again.png"]
    samples = page.locator(".sample:visible")
    assert samples.count() == 24
    shown = page.locator("img").evaluate_all("all => all.map(i => i.complete && i.naturalWidth)")
    assert len(shown) == 26 and min(shown) > 0
    assert all(url.startswith(("file:", "data:")) for url in asked)


def test_samples_can_be_chosen_by_source(built, page, root, tmp_path, write_json):
    from data_builders.build import build_recipe
    from data_builders.recipe import parse_recipe

    other = [{"image": "0.jpg", "question": "Only one?", "answer": "Only one."}]
    sources = [
        {"source": "custom_vqa", "name": name, "annotations": [str(path)]}
        for name, path in (("many", built().manifest["inputs"][0]["path"]),
                           ("few", write_json("few.json", other)))
    ]  # fmt: skip
    result = build_recipe(parse_recipe(
        {"out": str(tmp_path / "two"), "image_root": str(root), "sources": sources}, "test"
    ))  # fmt: skip
    page.goto((result.out / "report.html").as_uri())
    assert page.locator(".sample:visible").count() == 13
    page.locator(".picks label", has_text="few").click()
    assert page.locator(".sample:visible").all_inner_texts()[0].endswith("Only one.")
    assert page.locator(".sample:visible").count() == 1
    page.locator(".picks label", has_text="all").click()
    assert page.locator(".sample:visible").count() == 13
    assert page.evaluate("getComputedStyle(document.querySelector('.share div')).flexGrow") == "38"


@pytest.mark.parametrize("width", [390, 1200])
def test_nothing_sticks_out(built, page, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto((built().out / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == width


def test_lengths_in_tokens(built, page, tmp_path):
    words = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    page.goto((built(tokenizer=str(tmp_path)).out / "report.html").as_uri())
    figure = page.locator("figure", has_text="Tokens an answer")
    # 36 times "number N of all", 36 times "yes", once "A round one ."
    assert "median 4" in figure.inner_text()
    assert figure.locator(".bar").first.get_attribute("title") == "0-4: 73 (100 %)"
    with pytest.raises(DataError, match=r"nowhere.json: no such file; expected a tokenizer.json"):
        built(tokenizer=str(tmp_path / "nowhere.json"))
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(DataError, match=r"broken\.json: cannot be read"):
        built(tokenizer=str(tmp_path / "broken.json"))


def test_boxes_are_drawn_on_the_samples(root, run, write_json):
    Image.new("RGB", (200, 100), "black").save(root / "1.png")
    says = "A dog [[100,200,500,800;600,000,999,999]] and a cat [[100,200,500,800]] at [[1,2,3,4]]"
    assert boxes_in([says, "no box"]) == [(100, 200, 500, 800), (600, 0, 999, 999)]
    path = write_json("q.json", [{"image": "1.png", "question": "Where?", "answer": says}])
    _, _, result = run("custom_vqa", [path])
    (shown,) = re.findall(r"base64,([^\"]+)", (result.out / "report.html").read_text())
    image = Image.open(io.BytesIO(base64.b64decode(shown)))
    bright = [[sum(image.getpixel((x, y))) > 150 for x in range(200)] for y in range(100)]
    assert bright[50][20] and bright[50][99] and bright[20][60] and bright[79][60]
    assert bright[50][121] and bright[50][198] and not bright[50][60] and not bright[50][110]
