"""Small pictures and raw files in the released shapes, written anew for every test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image


def save_picture(path: Path, colour: int = 0, size: tuple[int, int] = (48, 40)) -> Path:
    """A picture with a gradient, so that perceptual hashes differ by `colour`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", size)
    image.putdata(
        [
            (
                (x * 5 + colour * 37) % 256,
                (y * 6 * (colour + 1)) % 256,
                (x * y * (colour + 2)) % 256,
            )
            for y in range(size[1])
            for x in range(size[0])
        ]
    )
    image.save(path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    return folder


@pytest.fixture
def write_json(tmp_path: Path) -> Callable[[str, Any], Path]:
    def write(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        return path

    return write


@pytest.fixture
def run(tmp_path: Path, root: Path) -> Callable[..., Any]:
    """Builds one source; returns (manifest row, records sorted by original place, result)."""
    from data_builders.build import build_recipe
    from data_builders.recipe import parse_recipe

    def build(source: str, annotations: list[Path], **keys: Any) -> Any:
        entry = {"source": source, "annotations": [str(path) for path in annotations]}
        entry |= {key: keys.pop(key) for key in list(keys) if key not in GENERAL}
        content = {"out": str(tmp_path / "build"), "image_root": str(root), "sources": [entry]}
        result = build_recipe(parse_recipe(content | keys, "test"))
        records = read_build(result.out)
        return result.manifest["sources"][source], records, result

    return build


GENERAL = {
    "seed", "images_rules", "shard_size", "workers", "deduplicate", "decontaminate", "out",
    "image_root", "tokenizer",
}  # fmt: skip


def read_build(out: Path) -> list[dict[str, Any]]:
    lines = [
        line
        for path in sorted(out.glob("conversations-*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    records = [json.loads(line) for line in lines]
    return sorted(records, key=lambda r: (r["meta"]["orig_file"], r["meta"]["orig_index"], r["id"]))


@pytest.fixture
def picture() -> Callable[..., Path]:
    return save_picture


@pytest.fixture
def read() -> Callable[[Path], list[dict[str, Any]]]:
    return read_build
