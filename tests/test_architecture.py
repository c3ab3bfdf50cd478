"""The floors of the house: a room imports only from rooms below it or listed before it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# From the ground up; on one floor a room may import from rooms that stand before it.
FLOORS = [
    ["cogvlm_sft.model", "cogvlm_sft.errors", "cogvlm_sft.allocator", "cogvlm_sft.launch"],
    [
        "cogvlm_sft.conversation",
        "cogvlm_sft.recipe",
        "cogvlm_sft.tune",
    ],
    ["cogvlm_sft.checkpoint", "cogvlm_sft.data", "data_builders"],
    ["cogvlm_sft.evaluation", "cogvlm_sft.training"],
    ["cogvlm_sft.chat", "cogvlm_sft.demo"],
    ["cogvlm_sft.cli"],
]
RANK = {room: rank for rank, room in enumerate(room for floor in FLOORS for room in floor)}
TORCH_FREE = ["data_builders", "cogvlm_sft.conversation", "cogvlm_sft.recipe"]


def room_of(module: str) -> str | None:
    matches = [room for room in RANK if module == room or module.startswith(room + ".")]
    return max(matches, key=len) if matches else None


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                # The model's folder refers to itself relatively, so that it can be shipped alone.
                assert node.level == 1 and path.parent.name == "model", f"{path}: relative import"
                continue
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def sources() -> list[tuple[str, Path]]:
    files = [*(ROOT / "cogvlm_sft").rglob("*.py"), *(ROOT / "data_builders").rglob("*.py")]
    named = []
    for path in sorted(files):
        parts = path.relative_to(ROOT).with_suffix("").parts
        named.append((".".join(part for part in parts if part != "__init__"), path))
    assert len(named) > 20
    return named


@pytest.mark.parametrize("module, path", sources(), ids=lambda value: str(value)[-40:])
def test_imports_go_down(module: str, path: Path) -> None:
    if module == "cogvlm_sft":
        return
    room = room_of(module)
    assert room is not None, f"{module} stands in no room of the house"
    for name in imports_of(path):
        target = room_of(name)
        # The errors are the one thing on the ground floor that the model may share.
        if target is None or target in (room, "cogvlm_sft.errors"):
            continue
        assert RANK[target] < RANK[room], f"{module} imports {name}, which is not below it"


@pytest.mark.parametrize("module", ["cogvlm_sft", "cogvlm_sft.cli", *TORCH_FREE])
def test_light_modules_load_no_torch(module: str) -> None:
    code = (
        f"import sys, {module}; "
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert printed.stdout.strip() == "[]"


def test_builders_never_name_torch() -> None:
    for path in (ROOT / "data_builders").rglob("*.py"):
        heavy = {name.split(".")[0] for name in imports_of(path)} & {"torch", "transformers"}
        assert not heavy, f"{path} imports {heavy}"


def test_nothing_trusts_remote_code() -> None:
    for _, path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert getattr(node.value, "value", None) is False, path
            # Not told, transformers asks on the terminal, and runs the code on "y".
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "AutoTokenizer.from_pretrained",
                "AutoProcessor.from_pretrained",
                "CogVLMProcessor.from_pretrained",
            ):
                assert "trust_remote_code" in {word.arg for word in node.keywords}, path
            if isinstance(node, ast.keyword) and node.arg == "weights_only":
                assert getattr(node.value, "value", None) is True, path


def test_no_vague_rooms() -> None:
    vague = {"utils", "util", "helpers", "common", "misc"}
    assert not [path for _, path in sources() if vague & set(path.with_suffix("").parts[-3:])]


def test_public_names_are_what_they_say() -> None:
    import importlib
    import pkgutil

    import cogvlm_sft

    assert cogvlm_sft.__all__ == sorted(cogvlm_sft.__all__)
    for found in pkgutil.walk_packages(cogvlm_sft.__path__, "cogvlm_sft."):
        importlib.import_module(found.name)
    for name in cogvlm_sft.__all__:
        value = getattr(cogvlm_sft, name)
        assert callable(value), f"cogvlm_sft.{name} is {value!r}"
        assert value.__name__ == name
