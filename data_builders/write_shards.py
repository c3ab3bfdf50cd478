"""Writes the conversations in their final order, a shard at a time, each complete or not there."""

import hashlib
import os
from pathlib import Path
from typing import Any

from data_builders.mix import Ledger
from data_builders.progress import progress
from data_builders.workfolder import WorkFolder


def write_shards(
    work: WorkFolder, folder: Path, ledger: Ledger, records: Any, copies: Any, shard_size: int
) -> list[dict[str, Any]]:
    """Writes `conversations-00000-of-000NN.jsonl` and so on.

    Args:
        work: Knows which shards an interrupted run has written.
        folder: Where they go.
        ledger: Has the lines.
        records: Record numbers in the order of the build.
        copies: Which copy of its record each is; 0 first.
        shard_size: Conversations a file.

    Returns:
        Name, conversations, bytes and sha256 of each file.
    """
    shards = max(1, -(-len(records) // shard_size))
    files: list[dict[str, Any]] = []
    with progress(len(records), "writing", " conversations", scale=True) as bar:
        for number in range(shards):
            part = slice(number * shard_size, (number + 1) * shard_size)
            path = folder / f"conversations-{number:05d}-of-{shards:05d}.jsonl"
            done = work.load("written", number)
            if done and path.is_file() and path.stat().st_size == done.facts["bytes"]:
                files.append(done.facts)
            else:
                work.start("written", number)
                files.append(_write_shard(path, ledger, records[part], copies[part]))
                work.finish("written", number, files[-1])
            bar.update(len(records[part]))
    return files


def _write_shard(path: Path, ledger: Ledger, records: Any, copies: Any) -> dict[str, Any]:
    digest = hashlib.sha256()
    size = 0
    partial = path.with_suffix(".partial")
    with partial.open("wb", buffering=1 << 20) as stream:
        for line in ledger.lines(records, copies):
            stream.write(line)
            digest.update(line)
            size += len(line)
    os.replace(partial, path)
    return {
        "name": path.name,
        "conversations": len(records),
        "bytes": size,
        "sha256": digest.hexdigest(),
    }
