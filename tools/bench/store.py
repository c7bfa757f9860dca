"""What hashing costs a synced save and checking costs a load, and how fast candidate hashes are.

One process, float32: a model of random weights with its optimizer, about 2 GB of checkpoint. Sides take turns, each
save goes to an empty folder and ends with everything synced; loads are from the page cache. Ends with status 1 where a
share exceeds its bar: 10 % of a save, 25 % of a load.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import xxhash
from transformers import MistralConfig

from nvembed_mcore.checkpoint import manifest, store
from nvembed_mcore.checkpoint.saver import Saver
from nvembed_mcore.config import CheckpointConfig, ModelConfig, OptimConfig, ParallelConfig, PoolingConfig
from nvembed_mcore.model.encoder import Encoder, wrap_data_parallel
from nvembed_mcore.optim import build_optimizer
from nvembed_mcore.parallel.groups import initialize

FIGURES = """keys of the figures:
  checkpoint_bytes             of all files of the checkpoint
  save_seconds                 synced save, hashed while it is written (median of the repeats)
  save_unhashed_seconds        the same without hashing
  save_hashing_share           how much longer hashing makes a save (median over the turns); bar 0.10
  load_seconds                 checking all files and loading into model and optimizer
  load_unchecked_seconds       the same without checking
  load_checking_share          how much longer checking makes a load (median over the turns); bar 0.25
  HASH_bytes_per_second        of one thread over 256 MB in memory: xxh3_128, crc32, sha256, blake2b
"""
HASHES: dict[str, Callable[[memoryview], object]] = {
    "xxh3_128": lambda content: xxhash.xxh3_128(content).digest(),
    "crc32": zlib.crc32,
    "sha256": lambda content: hashlib.sha256(content).digest(),
    "blake2b": lambda content: hashlib.blake2b(content).digest(),
}
BARS = {"save_hashing_share": 0.10, "load_checking_share": 0.25}


class NoHash:
    """Stands in for a hash that costs nothing."""

    def update(self, content: memoryview) -> None:
        pass

    def hexdigest(self) -> str:
        return "0" * 32


@contextlib.contextmanager
def unhashed() -> Iterator[None]:
    plain, manifest.xxhash.xxh3_128 = manifest.xxhash.xxh3_128, NoHash
    try:
        yield
    finally:
        manifest.xxhash.xxh3_128 = plain


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Bench:
    """A model and its optimizer after one step, which are saved and loaded."""

    def __init__(self, room: Path, layers: int) -> None:
        self.room, self.groups = room, initialize(ParallelConfig())
        self.hf_config = MistralConfig(
            hidden_size=1024,
            intermediate_size=3584,
            num_hidden_layers=layers,
            num_attention_heads=16,
            num_key_value_heads=4,
            head_dim=64,
            vocab_size=32000,
            sliding_window=None,
        )
        model = ModelConfig(config="unused", pooling=PoolingConfig(kind="mean"))
        encoder = Encoder(self.hf_config, model, ParallelConfig(), self.groups)
        self.chunks = wrap_data_parallel([encoder], ParallelConfig(), distributed_optimizer=True)
        self.optimizer = build_optimizer(OptimConfig(), self.chunks)
        for parameter in encoder.parameters():
            parameter.main_grad.normal_()
        self.optimizer.step()

    def save(self) -> float:
        """Seconds of a save to an empty folder."""
        shutil.rmtree(self.room, ignore_errors=True)
        facts = {"config": {"loss": {}, "model": {"pooling": vars(PoolingConfig(kind="mean"))}}}
        facts["hf_config"] = self.hf_config.to_dict()
        saver = Saver(CheckpointConfig(), self.room, self.groups)
        return seconds_of(lambda: saver.save(1, self.chunks, self.optimizer, facts))

    def load(self) -> float:
        """Seconds of a load that checks first, as a resume does."""
        return seconds_of(
            lambda: store.load_checkpoint(
                store.newest_good(CheckpointConfig(), self.room), self.chunks, self.optimizer
            )
        )

    def load_unchecked(self) -> float:
        return seconds_of(lambda: store.load_checkpoint(store.find_checkpoint(self.room), self.chunks, self.optimizer))


def bench(room: Path, layers: int, repeats: int) -> dict[str, float]:
    one, figures = Bench(room, layers), {}
    one.save()
    one.load()
    saves, loads = [], []
    for _ in range(repeats):
        with unhashed():
            without = one.save()
        saves.append((one.save(), without))
    figures["checkpoint_bytes"] = sum(file.stat().st_size for file in room.rglob("*") if file.is_file())
    for _ in range(repeats):
        loads.append((one.load(), one.load_unchecked()))
    for name, without, share, turns in (
        ("save", "save_unhashed", "save_hashing_share", saves),
        ("load", "load_unchecked", "load_checking_share", loads),
    ):
        figures[f"{name}_seconds"] = statistics.median(plain for plain, _ in turns)
        figures[f"{without}_seconds"] = statistics.median(bare for _, bare in turns)
        figures[share] = statistics.median(plain / bare for plain, bare in turns) - 1
    content = memoryview(bytearray(torch.randint(0, 256, (1 << 28,), dtype=torch.uint8).numpy()))
    for name, hash in HASHES.items():
        seconds = statistics.median(seconds_of(lambda hash=hash: hash(content)) for _ in range(3))
        figures[f"{name}_bytes_per_second"] = len(content) / seconds
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=7, help="of the model; 7 make about 2 GB (default: 7)")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement (default: 5)")
    parser.add_argument("--room", type=Path, help="folder to write in (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures to PATH as one flat object")
    arguments = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="nvembed-bench-", dir=arguments.room))
    try:
        figures = bench(room / "run", arguments.layers, arguments.repeats)
    finally:
        shutil.rmtree(room)
    for name, figure in figures.items():
        print(f"{name:>26} {figure:,.3f}" if figure < 1000 else f"{name:>26} {figure:,.0f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    over = [name for name, bar in BARS.items() if figures[name] > bar]
    if over:
        print(f"over their bar: {', '.join(over)}")
    return 1 if over else 0


if __name__ == "__main__":
    raise SystemExit(main())
