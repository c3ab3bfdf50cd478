"""Tensors on the disk, one at a time: headers first, never more than a tensor in memory.

Reading goes through safetensors' own reader, opened anew for each tensor: it maps the file, and
mapped pages count as the process's memory until the file is closed. Writing is by hand, because
`safetensors.save_file` wants a whole shard in memory (the format is a length, a JSON header and the
bytes); the shards are cut and indexed as the released repositories are.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from cogvlm_sft.errors import CheckpointError

SHARD_BYTES = 5_000_000_000  # as the released repositories are cut
INDEX = "model.safetensors.index.json"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
}
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about a tensor before any of it is read."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written: its header is known before it is made.

    Attributes:
        name: released name.
        shape: of the tensor that `make` returns.
        dtype: on the disk; `make`'s result is cast to it.
        make: reads or computes the tensor, called once, when its turn comes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes on the disk."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def read_headers(files: Iterable[Path]) -> dict[str, Header]:
    """Shape, dtype and file of every tensor in safetensors files.

    Raises:
        CheckpointError: a file is damaged or truncated, or a tensor stands in two files.
    """
    found: dict[str, Header] = {}
    for file in files:
        try:
            with safe_open(file, framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    if name in found:
                        raise CheckpointError(
                            f"{file}: {name} stands in {found[name].file.name} too; expected "
                            "every tensor once"
                        )
                    entry = tensors.get_slice(name)
                    found[name] = Header(file, tuple(entry.get_shape()), entry.get_dtype())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: damaged or incomplete ({error}); fetch it again"
            ) from None
    return found


def read_tensor(
    name: str,
    header: Header,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    rows: slice = slice(None),
) -> torch.Tensor:
    """One tensor, or some of its rows, in memory of its own.

    Args:
        name: of the tensor.
        header: where it is.
        dtype: to cast a floating tensor to; None keeps the file's.
        device: to put it on.
        rows: along the first dimension; only these are read.

    Raises:
        CheckpointError: the file was damaged since its header was read.
    """
    try:
        with safe_open(header.file, framework="pt") as tensors:
            mapped: torch.Tensor = (
                tensors.get_tensor(name) if rows == slice(None) else tensors.get_slice(name)[rows]
            )
            kept = dtype if dtype is not None and mapped.is_floating_point() else mapped.dtype
            return mapped.to(device, kept, copy=True)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{header.file}: {name} cannot be read: {error}") from None


def dtype_of(header: Header) -> torch.dtype:
    """The torch dtype of a tensor on the disk.

    Raises:
        CheckpointError: it is of a kind that no CogVLM has, such as an 8-bit float.
    """
    if header.dtype not in _BY_NAME:
        raise CheckpointError(
            f"{header.file}: a tensor of dtype {header.dtype}; expected one of "
            f"{', '.join(_BY_NAME)}"
        )
    return _BY_NAME[header.dtype]


def write_weights(
    folder: Path, tensors: Sequence[Planned], *, shard_bytes: int = SHARD_BYTES, label: str = ""
) -> list[Path]:
    """Writes tensors as safetensors, in as many shards as it takes, with an index for several.

    Args:
        folder: gets `model.safetensors`, or `model-00001-of-000NN.safetensors` and the index.
        tensors: in the order they are made and written.
        shard_bytes: most bytes of a shard; a single larger tensor gets one of its own.
        label: of the progress bar; "" shows none.

    Raises:
        CheckpointError: a made tensor does not have the planned shape.
        OSError: the disk is full or not writable.
    """
    shards: list[list[Planned]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    count = len(shards)
    names = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    total = sum(tensor.nbytes for tensor in tensors)
    with tqdm(total=total, desc=label, unit="B", unit_scale=True, disable=not label) as bar:
        for name, shard in zip(names, shards, strict=True):
            write_shard(folder / name, shard, bar.update)
    if count > 1:
        weight_map = {
            tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in names]


def write_shard(file: Path, tensors: Sequence[Planned], written: Callable[[int], object]) -> None:
    """Writes one safetensors file, a tensor at a time.

    Args:
        file: to write.
        tensors: in their order in the file.
        written: called with the bytes of each tensor once it is written.

    Raises:
        CheckpointError: a made tensor does not have the planned shape.
        OSError: the disk is full or not writable.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + tensor.nbytes],
        }
        start += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in tensors:
            made = tensor.make()
            if tuple(made.shape) != tensor.shape:
                raise CheckpointError(
                    f"{tensor.name}: has shape {tuple(made.shape)}, expected {tensor.shape}"
                )
            flat = made.detach().to("cpu", tensor.dtype).contiguous().reshape(-1)
            flat.view(torch.uint8).numpy().tofile(stream)
            written(tensor.nbytes)


def check_fit(
    where: str | Path,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    files: Mapping[str, Path] | None = None,
    optional: str = "",
) -> None:
    """Compares names and shapes with those a configuration asks for.

    Args:
        where: folder, for the message.
        found: shape of every tensor there is.
        expected: shape of every tensor there must be.
        files: the file that holds a found tensor, for the message.
        optional: ending of names that may be missing, or be there in excess.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen; some are named.
    """

    def place(name: str) -> str:
        return f" in {files[name].name}" if files and name in files else ""

    missing, unexpected = (
        sorted(name for name in names if not (optional and name.endswith(optional)))
        for names in (expected.keys() - found.keys(), found.keys() - expected.keys())
    )
    misshapen = [
        f"{name}: {found[name]}{place(name) or ' in the file'}, {shape} by config.json"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if missing or unexpected or misshapen:
        unexpected = [f"{name}{place(name)}" for name in unexpected]
        raise CheckpointError(
            f"{where}: the weights do not fit config.json: {len(missing)} missing "
            f"({first_few(missing)}), {len(unexpected)} unexpected ({first_few(unexpected)}), "
            f"{len(misshapen)} misshapen ({first_few(misshapen)})"
        )


def first_few(names: Sequence[str]) -> str:
    """Three of many names, for a message."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (", ".join(names[:3]) or "none") + more


__all__ = [
    "INDEX",
    "SHARD_BYTES",
    "Header",
    "Planned",
    "check_fit",
    "dtype_of",
    "first_few",
    "read_headers",
    "read_tensor",
    "write_shard",
    "write_weights",
]
