"""Writing safetensors one tensor at a time: a file never has to fit into memory.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of the header, the header in JSON,
filled up with spaces to a multiple of eight bytes, then the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch

from nvembed_mcore.checkpoint.names import Entry, to_hf
from nvembed_mcore.progress import Progress, progress

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SUMS_FILE = "SHA256SUMS"
"""Beside the weights of an export: what `sha256sum --check SHA256SUMS` reads, one line a file."""
MAX_SHARD_BYTES = 5_000_000_000
"""Largest weight file by default, as Hugging Face has it."""
_BLOCK = 1 << 24
"""Numbers that are converted and written at once."""


class NotFiniteError(ValueError):
    """A number is infinite or none at all in the type it is written in; the message names file, tensor and values."""


def write_weights(
    read_global: Callable[[str], torch.Tensor],
    entries: list[Entry],
    directory: Path,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Safetensors files, their index where there are several, and their sums; one parameter is in memory at a time."""
    shards = _plan_shards(entries, dtype, max_shard_bytes)
    weight_map: dict[str, str] = {}
    parameters, sums = 0, ""
    for number, shard in enumerate(shards, start=1):
        file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shapes = {name: shape for entry in shard for name, shape in entry.hf.items()}
        with progress(f"write {file}", len(shard), "tensors") as shown:
            digest = write_safetensors(directory / file, shapes, dtype, _tensors(read_global, shard, shown))
        weight_map |= dict.fromkeys(shapes, file)
        parameters += sum(torch.Size(shape).numel() for shape in shapes.values())
        sums += f"{digest}  {file}\n"
    (directory / SUMS_FILE).write_text(sums)
    if len(shards) > 1:
        metadata = {"total_parameters": parameters, "total_size": parameters * dtype.itemsize}
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterable[tuple[str, torch.Tensor]],
) -> str:
    """Write one file.

    Args:
        shapes: of its tensors, in the order in which they come.
        dtype: of the written numbers: float32, bfloat16 or float16.
        tensors: (name, contiguous tensor) of any floating dtype and device; each is let go before the next is asked
            for.

    Returns:
        SHA-256 of the file, in hexadecimal digits.

    Raises:
        NotFiniteError: a number is infinite or none at all, or does not fit `dtype`.
    """
    digest = hashlib.sha256()
    expected = iter(shapes.items())
    with open(path, "wb") as file:

        def write(content: bytes | memoryview) -> None:
            file.write(content)
            digest.update(content)

        write(_header(shapes, dtype))
        for name, tensor in tensors:
            assert (name, tuple(tensor.shape)) == next(expected), f"{name} is not what comes next"
            for block in tensor.detach().view(-1).split(_BLOCK):
                written = block.to("cpu", dtype)
                if not torch.isfinite(torch.stack(torch.aminmax(written))).all():
                    low, high = (number.item() for number in torch.aminmax(block))
                    raise NotFiniteError(
                        f"{path.name}: tensor {name!r} has numbers that are not finite in {dtype}: smallest {low}, "
                        f"largest {high}"
                    )
                write(memoryview(written.view(torch.uint8).numpy()))
            del tensor, block, written
        assert next(expected, None) is None, "tensors are missing"
    return digest.hexdigest()


def sync_files(folder: Path) -> None:
    """Wait until every file below a folder is on the disk, so that a name given to it afterwards stands for all."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Bytes of a tensor."""
    return torch.Size(shape).numel() * dtype.itemsize


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    table: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + bytes_of(shape, dtype)
        table[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _plan_shards(entries: list[Entry], dtype: torch.dtype, max_shard_bytes: int) -> list[list[Entry]]:
    """Parameters in order, cut into files; one that is larger than the limit gets a file of its own."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        size = sum(bytes_of(shape, dtype) for shape in entry.hf.values())
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    return shards


def _tensors(
    read_global: Callable[[str], torch.Tensor], entries: list[Entry], shown: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face tensors of parameters; a parameter is let go before the next one is read."""
    for done, entry in enumerate(entries):
        shown.update(done)
        parts = to_hf(entry, read_global(entry.name).detach())
        while parts:
            name = next(iter(parts))
            yield name, parts.pop(name)
