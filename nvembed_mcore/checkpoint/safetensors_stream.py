"""Writing safetensors one tensor at a time: a file never has to fit into memory.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of the header, the header in JSON,
filled up with spaces to a multiple of eight bytes, then the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
SUMS_FILE = "SHA256SUMS"
"""Beside the weights of an export: what `sha256sum --check SHA256SUMS` reads, one line a file."""
_BLOCK = 1 << 24
"""Numbers that are converted and written at once."""


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
                write(memoryview(block.to("cpu", dtype).view(torch.uint8).numpy()))
            del tensor, block
        assert next(expected, None) is None, "tensors are missing"
    return digest.hexdigest()


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
