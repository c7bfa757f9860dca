"""The weights of a Hugging Face folder: what its headers say, and slices of its tensors.

Opening a folder reads every header and nothing else. It finds what headers can tell: files that are cut short or that
the index names in vain, tensors that overlap, are there twice or are of a type that cannot be read. Bits that flipped
among the numbers do not show in safetensors; `check_sums` finds them where the folder has a `SHA256SUMS`, which our
exports have, and reading finds the ones that made a number infinite or no number at all (`check_finite`).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from nvembed_mcore import paths
from nvembed_mcore.checkpoint.names import BACKBONE
from nvembed_mcore.checkpoint.safetensors_stream import INDEX_FILE, SINGLE_FILE, SUMS_FILE
from nvembed_mcore.progress import show_each

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PREFIXES = (BACKBONE, "model.", "")


class WeightsError(ValueError):
    """A folder of weights cannot be used; the message names the file, the tensor and both values."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as its file's header describes it."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    """Its first byte in the file."""

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class HfFolder:
    """The tensors of a Hugging Face or PEFT folder, by NV-Embed's names whatever names the folder has.

    Attributes:
        prefix: what stands there in place of NV-Embed's `embedding_model.`.
        may_lack: parts of an encoder that such a folder may lack as a whole.
    """

    def __init__(
        self,
        path: Path,
        tensors: dict[str, StoredTensor],
        prefix: str,
        may_lack: tuple[str, ...] = ("head", "adapters"),
    ) -> None:
        """`tensors`: by the names that stand in the files."""
        self.path, self.tensors, self.prefix, self.may_lack = path, tensors, prefix, may_lack

    @property
    def files(self) -> list[str]:
        """Names of its weight files."""
        return sorted({tensor.file for tensor in self.tensors.values()})

    def stored_name(self, hf_name: str) -> str:
        """The folder's own name of the tensor that NV-Embed calls `hf_name`."""
        return self.prefix + hf_name[len(BACKBONE) :] if hf_name.startswith(BACKBONE) else hf_name

    def has(self, hf_name: str) -> bool:
        """Whether the folder has the tensor that NV-Embed calls `hf_name`."""
        return self.stored_name(hf_name) in self.tensors

    def check(self, hf_name: str, shape: tuple[int, ...]) -> None:
        """Raise a `WeightsError` when the tensor is missing or has another shape."""
        stored = self.stored_name(hf_name)
        if stored not in self.tensors:
            raise WeightsError(f"{self.path} has no tensor {stored!r} of shape {list(shape)}")
        found = self.tensors[stored]
        if found.shape != tuple(shape):
            raise WeightsError(
                f"{self.path / found.file}: tensor {stored!r} has shape {list(found.shape)}, the model needs "
                f"{list(shape)}"
            )

    def read(self, hf_name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor whose pages are read from the file where it is used, and let go with it.

        Raises:
            WeightsError: it is missing, has another shape, or cannot be read.
        """
        self.check(hf_name, shape)
        stored = self.stored_name(hf_name)
        tensor = self.tensors[stored]
        try:
            return _mapped(self.path / tensor.file, tensor)
        except (OSError, ValueError) as error:
            raise WeightsError(f"cannot read tensor {stored!r} from {self.path / tensor.file}: {error}") from error

    def check_finite(self, hf_names: Iterable[str], tensor: torch.Tensor) -> None:
        """Raise a `WeightsError` when a number of `tensor`, which was made from these, is infinite or none at all."""
        low, high = torch.aminmax(tensor)
        if not (torch.isfinite(low) and torch.isfinite(high)):
            names = [self.stored_name(name) for name in hf_names]
            files = sorted({str(self.path / self.tensors[name].file) for name in names})
            raise WeightsError(
                f"{', '.join(files)}: tensor {' or '.join(map(repr, names))} has numbers that are not finite in "
                f"{str(tensor.dtype).removeprefix('torch.')}: smallest {low.item()}, largest {high.item()}"
            )


def open_hf_folder(path: str | os.PathLike) -> HfFolder:
    """Open a folder with `config.json` and either `model.safetensors` or shards with their index.

    Raises:
        WeightsError: the folder, its configuration or its weights are missing or unreadable; the index and the files
            disagree; or the weights are only there as pickled files, which are never loaded.
    """
    path = Path(path)
    if not path.is_dir():
        raise WeightsError(f"no Hugging Face folder at {path}")
    if not (path / "config.json").is_file():
        raise WeightsError(f"{path} has no config.json")
    tensors = read_headers(path)
    return HfFolder(path, tensors, _backbone_prefix(path, tensors))


def _backbone_prefix(path: Path, tensors: dict[str, StoredTensor]) -> str:
    """An NV-Embed folder has `embedding_model.*`, a `MistralForCausalLM` `model.*`, a `MistralModel` bare names."""
    found = [prefix for prefix in PREFIXES if f"{prefix}embed_tokens.weight" in tensors]
    if len(found) > 1:
        raise WeightsError(
            f"{path} holds a backbone twice: {' and '.join(f'{one}embed_tokens.weight' for one in found)}"
        )
    if found:
        return found[0]
    some = ", ".join(sorted(tensors)[:3])
    raise WeightsError(
        f"{path} holds no Mistral backbone: embed_tokens.weight is missing under each of the prefixes "
        f"'embedding_model.', 'model.' and none; its tensors start with {some or 'nothing'}"
    )


def read_headers(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a folder's safetensors files, by its stored name.

    Raises:
        WeightsError: as for `open_hf_folder`.
    """
    if (path / INDEX_FILE).is_file():
        if (path / SINGLE_FILE).is_file():
            raise WeightsError(
                f"{path} has both {SINGLE_FILE} and {INDEX_FILE}: remove one, libraries differ in which"
            )
        return _indexed_tensors(path)
    if (path / SINGLE_FILE).is_file():
        return read_header(path / SINGLE_FILE)
    pickled = sorted(file.name for pattern in PICKLED for file in path.glob(pattern))
    if pickled:
        raise WeightsError(
            f"{path} has only pickled weights ({pickled[0]}), which can run code when loaded; convert them to "
            f"safetensors"
        )
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    raise WeightsError(
        f"{path} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}" + (f", only {shards[0]}" if shards else "")
    )


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file.

    Raises:
        WeightsError: it is cut short or damaged, or a tensor is not of floating-point numbers.
    """
    try:
        # The library's checks of lengths, gaps and overlaps. In this framework it maps a file to be read only, which
        # may then be larger than the memory.
        with safe_open(file, framework="np"), open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(length))
    except (OSError, ValueError, SafetensorError) as error:
        size = f"{file.stat().st_size:,}" if file.is_file() else "no"
        raise WeightsError(f"cannot read {file}: {error} (the file has {size} bytes)") from error
    tensors = {}
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        if tensor["dtype"] not in DTYPES:
            raise WeightsError(
                f"{file}: tensor {name!r} is of type {tensor['dtype']}; only {', '.join(DTYPES)} can be read"
            )
        shape, begin = tuple(tensor["shape"]), 8 + length + tensor["data_offsets"][0]
        tensors[name] = StoredTensor(file.name, shape, DTYPES[tensor["dtype"]], begin)
    return tensors


def _mapped(file: Path, tensor: StoredTensor) -> torch.Tensor:
    """A tensor that is a part of the file: of this part alone, so that memory need not hold the file."""
    skipped = tensor.begin % mmap.ALLOCATIONGRANULARITY
    with open(file, "rb") as opened:
        pages = mmap.mmap(
            opened.fileno(),
            skipped + tensor.num_bytes,
            access=mmap.ACCESS_COPY,  # torch takes no memory that cannot be written to
            offset=tensor.begin - skipped,
        )
    count = torch.Size(tensor.shape).numel()
    return torch.frombuffer(pages, dtype=tensor.dtype, count=count, offset=skipped).view(tensor.shape)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        WeightsError: the file does not hold one.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{file} must hold an object, got {type(content).__name__}")
    return content


def check_sums(path: Path, files: Iterable[str]) -> int:
    """Compare files with the folder's `SHA256SUMS`; returns how many of them it lists. Reads the files whole.

    Raises:
        WeightsError: a file has other bytes than those that were written, or `SHA256SUMS` cannot be read.
    """
    sums = path / SUMS_FILE
    if not sums.is_file():
        return 0
    try:
        lines = sums.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read {sums}: {error}") from error
    recorded = {}
    for line in lines:
        digest, _, name = line.partition("  ")
        recorded[name] = digest
    checked = [name for name in files if name in recorded]
    for name in show_each(checked, f"verify {path.name}", "files"):
        with open(path / name, "rb") as file:
            found = _sha256(file)
        if found != recorded[name]:
            raise WeightsError(f"{path / name}: SHA-256 is {found}, {sums} says {recorded[name]}")
    return len(checked)


def _indexed_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors that the index names, which are those of its files."""
    index = path / INDEX_FILE
    wanted = read_index(index)
    files = sorted(set(wanted.values()))
    for file in files:
        if not (path / file).is_file():
            raise WeightsError(f"{index} names {file}, which is not in the folder")
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(path / file).items():
            if name not in wanted:
                raise WeightsError(f"{path / file} holds tensor {name!r}, which {index} does not name")
            if wanted[name] != file:
                raise WeightsError(f"{path / file} holds tensor {name!r}, which {index} places in {wanted[name]}")
            tensors[name] = tensor
    for name, file in wanted.items():
        if name not in tensors:
            raise WeightsError(f"{index} places tensor {name!r} in {file}, which does not hold it")
    return tensors


def read_index(index: Path) -> dict[str, str]:
    """`weight_map`: tensor -> file; every file is named as one of the folder itself."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise WeightsError(f"{index}: weight_map must map tensors to files, got {type(files).__name__}")
    for file in sorted({str(file) for file in files.values()}):
        paths.member(index.parent, file, index, WeightsError)
        if "/" in file or not file.endswith(".safetensors"):
            raise WeightsError(f"{index} names {file!r}, which is not a safetensors file of the folder")
    return files


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 22):
        digest.update(block)
    return digest.hexdigest()
