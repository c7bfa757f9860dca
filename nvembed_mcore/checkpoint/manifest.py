"""What makes a checkpoint folder whole: a list of its files with their sizes and hashes, and writing such files.

`manifest.json` is `{"format": 1, "step": 500, "files": {"state/__0_0.distcp": [bytes, hash], ...}}` and names every
other file of the folder. Each rank hashes what it writes while it writes, so what the disk made of it later is
compared with what left the process.

The hash is xxh3_128: the threat is silent corruption, not forgery, and it costs next to nothing beside writing
(docs/benchmarks.md has its speed beside that of SHA-256, BLAKE2 and CRC-32).
"""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import xxhash
from torch.distributed.checkpoint.filesystem import FileSystem

MANIFEST = "manifest.json"
FORMAT = 1
_BLOCK_BYTES = 1 << 22
_READ_BYTES = 1 << 20
"""What is read of a file before it is hashed: it should still be in the processor's cache then."""

Files = dict[str, tuple[int, str]]
"""Bytes and hash (32 hexadecimal digits) of files, by their path in the folder."""


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete, damaged or of another run; the message names the folder."""


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` of a folder says."""

    step: int
    files: Files


class HashingFile(io.RawIOBase):
    """A file to be written from its beginning to its end, which hashes what passes; when it is closed, all of it is on
    the disk.

    A write that fails is remembered and not raised, because torch's serializer would hide why: `tell` and `close`
    raise it. What follows a failed write is thrown away.

    Attributes:
        size, digest: bytes written so far, and their hash.
    """

    def __init__(self, path: str | os.PathLike, when_begun: Callable[[], None] | None = None) -> None:
        self._file = open(path, "wb", buffering=_BLOCK_BYTES)
        self._hash = xxhash.xxh3_128()
        self._when_begun, self._failure = when_begun, None
        self.size = 0

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    def writable(self) -> bool:
        return True

    def write(self, content) -> int:
        view = memoryview(content).cast("B")
        if self._failure is None:
            try:
                self._write(view)
            except Exception as error:
                self._failure = error
        self.size += len(view)
        return len(view)

    def _write(self, view: memoryview) -> None:
        self._file.write(view)
        self._hash.update(view)
        if self.size == 0 and self._when_begun:
            self._file.flush()
            self._when_begun()

    def tell(self) -> int:
        if self._failure is not None:
            raise self._failure
        return self.size

    def close(self) -> None:
        if self.closed:
            return
        try:
            self.tell()
            self._file.flush()
            os.fsync(self._file.fileno())
        finally:
            super().close()
            self._file.close()


class HashingFiles(FileSystem):
    """The file system that torch's checkpoint writer writes to.

    Attributes:
        files: what was written, by the files' names.
    """

    def __init__(self, when_begun: Callable[[], None] | None = None) -> None:
        self._when_begun = when_begun
        self.files: Files = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[HashingFile]:
        assert mode == "wb", mode
        with HashingFile(path, self._when_begun) as file:
            yield file
        self.files[Path(path).name] = (file.size, file.digest)

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.files[Path(new_path).name] = self.files.pop(Path(path).name)


def write_file(path: Path, content: bytes) -> tuple[int, str]:
    """Write a small file and wait until it is on the disk; returns its bytes and hash."""
    with HashingFile(path) as file:
        file.write(content)
    return file.size, file.digest


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, step: int, files: Files) -> None:
    """Write `manifest.json`, the last file of a folder."""
    tree = {"format": FORMAT, "step": step, "files": {name: list(files[name]) for name in sorted(files)}}
    write_file(folder / MANIFEST, (json.dumps(tree, indent=1) + "\n").encode())


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json`.

    Raises:
        CheckpointError: it is missing or is not one; the message begins with its name.
    """
    try:
        tree = json.loads((folder / MANIFEST).read_bytes())
        if tree["format"] != FORMAT:
            raise CheckpointError(f"{MANIFEST} has format {tree['format']!r}, this version reads {FORMAT}")
        files = {_inside(name): (size, digest) for name, (size, digest) in tree["files"].items()}
        if type(tree["step"]) is not int or not files:
            raise ValueError(f"step {tree['step']!r} with {len(files)} files")
        if not all(type(size) is int and type(digest) is str for size, digest in files.values()):
            raise ValueError("a file has no size or no hash")
        return Manifest(tree["step"], files)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{MANIFEST} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged ({error!r})") from error


def _inside(name: str) -> str:
    """A file's path in its folder, unless it leads out of it."""
    parts = PurePosixPath(name).parts
    is_text = "\0" not in name and name.isprintable()  # half a surrogate pair is no name of a file
    if name.startswith("/") or not is_text or ".." in parts or name != "/".join(parts) or not parts:
        raise ValueError(f"the path {name!r} does not stay in the folder")
    return name


def faults(folder: Path, files: Files, hashed: Iterable[str]) -> list[str]:
    """What is wrong with the files of a folder, one line each; nothing for a whole one.

    Args:
        files: that must be there, with the sizes that they must have.
        hashed: those whose content is read.
    """
    found = []
    hashed = {*hashed}
    for name, (size, digest) in files.items():
        path = folder / name
        try:
            has = path.stat().st_size
            if has != size:
                found.append(f"{name} has {has:,} bytes instead of {size:,}")
            elif name in hashed and hash_of(path) != digest:
                found.append(f"{name}: its content is not what was written")
        except FileNotFoundError:
            found.append(f"{name} is missing")
        except OSError as error:
            found.append(f"{name} cannot be read: {os.strerror(error.errno or errno.EIO)}")
    return found


def hash_of(path: Path) -> str:
    """The hash of a file's content. Not by mapping it: an error of the disk would end the process."""
    digest = xxhash.xxh3_128()
    block = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()
