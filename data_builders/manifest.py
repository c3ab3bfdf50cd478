"""The manifest of a build, and the check that a build still is what its manifest says.

`manifest.json` holds what the build was made of (inputs with sha256, recipe, seed, licences,
versions) and what became of every raw record: read = kept + dropped by named reason, for each
source. It holds no time, no host and no worker count, so the same inputs give the same bytes.
"""

import hashlib
import os
import platform
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson

from cogvlm_sft.conversation import parse_conversation, resolve_image
from cogvlm_sft.errors import DataError
from data_builders.image_check import ImageLimits
from data_builders.mix import Ledger
from data_builders.picture_shards import check_images
from data_builders.progress import progress
from data_builders.source import Source

SCHEMA = 1
SHOWN = 50


@dataclass(slots=True)
class VerifyReport:
    """What `verify` found.

    Attributes:
        conversations: Conversations read.
        images: Distinct pictures opened.
        problems: One line for each problem; empty when the build is sound.
    """

    conversations: int = 0
    images: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether the build is sound."""
        return not self.problems

    def summary(self) -> str:
        """One line, and one more for each of the first problems."""
        head = f"{self.conversations:,} conversations, {self.images:,} pictures opened"
        if self.ok:
            return f"{head}: sound"
        shown = self.problems[:SHOWN]
        if len(self.problems) > SHOWN:
            shown.append(f"and {len(self.problems) - SHOWN:,} more")
        count = f"{len(self.problems):,} problem{'s' * (len(self.problems) != 1)}"
        return "\n  ".join([f"{head}: not sound, {count}", *shown])


def sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def input_facts(source: Source) -> list[dict[str, Any]]:
    """Name, size and hash of every annotation file; one entry a folder where files are many."""
    name = source.entry.name
    facts: list[dict[str, Any]] = [
        {
            "source": name,
            "path": path.as_posix(),
            "bytes": path.stat().st_size,
            "sha256": sha256(path),
        }
        for path in source.inputs()
    ]
    if len(facts) <= 200:
        return facts
    folders: dict[str, list[dict[str, Any]]] = {}
    for fact in facts:
        folders.setdefault(str(Path(fact["path"]).parent.as_posix()), []).append(fact)
    return [
        {
            "source": name,
            "path": folder,
            "files": len(own),
            "bytes": sum(fact["bytes"] for fact in own),
            # the hash of all names and hashes, as `sha256sum *` prints them
            "sha256": hashlib.sha256(
                "".join(f"{f['sha256']}  {Path(f['path']).name}\n" for f in own).encode()
            ).hexdigest(),
        }
        for folder, own in folders.items()
    ]


def make_manifest(
    *,
    recipe: dict[str, Any],
    image_root: str,
    seed: int,
    inputs: list[dict[str, Any]],
    sources: list[Source],
    ledger: Ledger,
    written: dict[str, dict[str, int]],
    pictures: dict[str, int],
    held_out: dict[str, Any],
    refused: dict[str, list[str]],
    files: list[dict[str, Any]],
) -> dict[str, Any]:
    """Puts the manifest together; checks that nothing vanished.

    Args:
        recipe: The resolved recipe without what may not change the result.
        image_root: What paths are relative to.
        seed: Seed of the order.
        inputs: See `input_facts`.
        sources: The sources, in order.
        ledger: What happened to the records.
        written: Conversations, questions and answer characters written, per source.
        pictures: Counts of pictures by kind and size.
        held_out: Overlap with each held-out set.
        refused: Members of archives that were not unpacked, per archive.
        files: Name, conversations, bytes and sha256 of each shard.
    """
    table: dict[str, Any] = {}
    for source in sources:
        name = source.entry.name
        dropped = dict(sorted(ledger.drops[name].items()))
        kept = int(ledger.columns["units"][_of(ledger, name)].sum())
        if ledger.read[name] != kept + sum(dropped.values()):
            raise AssertionError(f"{name}: {ledger.read[name]} read, {kept} kept, {dropped}")
        table[name] = {
            "module": type(source).name,
            "title": source.title,
            "license": source.license,
            "commercial_use": source.commercial,
            "read": ledger.read[name],
            "kept": kept,
            "dropped": dropped,
            "repaired": dict(sorted(ledger.notes[name].items())),
            **written[name],
        }
    return {
        "schema": SCHEMA,
        "versions": versions(),
        "seed": seed,
        "image_root": image_root,
        "recipe": recipe,
        "inputs": inputs,
        "sources": table,
        "totals": {
            key: sum(row[key] for row in table.values())
            for key in ("read", "kept", "conversations", "questions")
        }
        | {"dropped": sum(sum(row["dropped"].values()) for row in table.values())},
        "licenses": sorted({row["license"] for row in table.values()}),
        "pictures": pictures,
        "held_out": held_out,
        "refused_archive_members": refused,
        "files": files,
        "examples": {
            name: [
                {"reason": e.reason, "file": e.file, "index": e.index, "excerpt": e.excerpt}
                for e in sorted(ledger.examples[name], key=lambda e: (e.reason, e.file, e.index))
            ]
            for name in ledger.sources
        },
    }


def versions() -> dict[str, str]:
    """Versions of what decides the bytes of a build."""
    return {
        "cogvlm-sft": _version("cogvlm-sft"),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("orjson", "ijson", "pillow", "numpy")},
    }


def _of(ledger: Ledger, name: str) -> Any:
    return ledger.alive & (ledger.columns["source"] == ledger.sources.index(name))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def read_manifest(build_dir: Path) -> dict[str, Any]:
    """The manifest of a build folder.

    Raises:
        DataError: The folder is no build, or its manifest is broken.
    """
    path = build_dir / "manifest.json"
    try:
        content = orjson.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{build_dir}: no manifest.json; is it a build folder?") from None
    except (orjson.JSONDecodeError, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error}); build again") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise DataError(f"{path}: not a manifest of schema {SCHEMA}; build again")
    return content


def is_build(folder: Path) -> bool:
    """Whether a folder's `manifest.json` is that of a build, of whatever schema."""
    try:
        content = orjson.loads((folder / "manifest.json").read_bytes())
    except (orjson.JSONDecodeError, OSError):
        return False
    made_by = content.get("versions") if isinstance(content, dict) else None
    return isinstance(made_by, dict) and "cogvlm-sft" in made_by and "schema" in content


def verify(
    build_dir: Path | str, image_root: Path | str | None = None, workers: int | None = None
) -> VerifyReport:
    """Checks a build: hashes, counts, every record valid, every id once, every picture opens.

    Args:
        build_dir: The build folder.
        image_root: Where its pictures are; the manifest's unless given.
        workers: Processes that decode pictures; one for each core unless given.

    Raises:
        DataError: It is not a build folder at all.
    """
    folder = Path(build_dir)
    manifest = read_manifest(folder)
    root = Path(image_root if image_root is not None else manifest["image_root"])
    report = VerifyReport()
    pictures: dict[str, str] = {}
    _verify_counts(manifest, report)
    _verify_files(folder, manifest, report, pictures)
    if pictures and not root.is_dir():
        report.problems.append(
            f"{len(pictures):,} pictures not opened: no folder {root} here; give the image root, "
            "--images DIR (the manifest's is relative to where the build was made)"
        )
        pictures.clear()
    paths: list[str] = []
    for relative, where in pictures.items():
        try:
            resolve_image(root, relative, where)
            paths.append(relative)
        except DataError as error:
            report.problems.append(str(error))
    limits = ImageLimits(1, float("inf"), manifest["recipe"]["images"]["max_pixels"])
    facts = check_images(root, sorted(paths), limits, False, workers or os.cpu_count() or 1)
    for relative, fact in zip(sorted(paths), facts, strict=True):
        if fact.reason is None:
            report.images += 1
        else:
            report.problems.append(f"{pictures[relative]}: {relative}: {fact.reason}")
    return report


def _verify_counts(manifest: dict[str, Any], report: VerifyReport) -> None:
    """Nothing vanished: records read are records kept and records dropped by name."""
    for name, row in manifest["sources"].items():
        gone = sum(row["dropped"].values())
        if row["read"] != row["kept"] + gone:
            report.problems.append(
                f"{name}: {row['read']:,} read are not {row['kept']:,} kept + {gone:,} dropped"
            )
    listed = sum(entry["conversations"] for entry in manifest["files"])
    if listed != manifest["totals"]["conversations"]:
        report.problems.append(
            f"manifest: its files hold {listed:,} conversations, its totals say "
            f"{manifest['totals']['conversations']:,}"
        )


def _verify_files(
    folder: Path, manifest: dict[str, Any], report: VerifyReport, pictures: dict[str, str]
) -> None:
    """Reads every shard; notes for each picture the line that shows it first."""
    ids: set[str] = set()
    listed = {entry["name"]: entry for entry in manifest["files"]}
    for stray in sorted({p.name for p in folder.glob("conversations-*.jsonl")} - set(listed)):
        report.problems.append(f"{stray}: not in the manifest")
    total = manifest["totals"]["conversations"]
    with progress(total, "reading", " conversations", scale=True) as bar:
        for name, entry in listed.items():
            path = folder / name
            if not path.is_file():
                report.problems.append(f"{name}: missing")
                continue
            digest = hashlib.sha256()
            count = 0
            with path.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    count += 1
                    bar.update()
                    digest.update(line)
                    where = f"{name}:{number}"
                    try:
                        conversation = parse_conversation(line, where)
                    except DataError as error:
                        report.problems.append(str(error))
                        continue
                    if conversation.id in ids:
                        report.problems.append(f"{where}: id {conversation.id} occurs twice")
                    ids.add(conversation.id)
                    for relative in conversation.images:
                        pictures.setdefault(relative, where)
            report.conversations += count
            if digest.hexdigest() != entry["sha256"]:
                report.problems.append(f"{name}: sha256 differs from the manifest's")
            if count != entry["conversations"]:
                report.problems.append(
                    f"{name}: {count} conversations, the manifest says {entry['conversations']}"
                )
