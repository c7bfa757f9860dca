"""Building, opening and reading a token store of short pairs: pairs a second, and the peak memory of each process.

Run from the root of the repository: PYTHONPATH=. python tools/bench/token_store.py --pairs 500000
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nvembed_mcore.config import DataConfig, DatasetConfig
from nvembed_mcore.data.prompts import query_prompt
from nvembed_mcore.data.source import BatchSource
from nvembed_mcore.data.tokenizer import load_tokenizer, write_mistral_tokenizer
from nvembed_mcore.data.tokens import TokenStore

FIGURES = """keys of the figures:
  pairs, tokens            pairs in the set, and tokens of all texts with prompt, <s> and </s>
  data_bytes, store_bytes  of the JSONL file, and of the store made of it
  build_seconds            from the call to the store's end: hashing the file, parsing, tokenising, writing
  build_pairs_per_second   pairs over that
  build_peak_bytes_N       most resident memory of each process of the build, the largest first (pages of shared
                           libraries count in each)
  open_seconds             TokenStore.open, in a process that has imported what it needs
  open_bytes               resident memory that it adds
  batch_seconds            one batch of 1,024 queries from BatchSource, mean over the batches
  read_peak_bytes          most resident memory of the process that opened and read, mapped pages included
  map_seconds              datasets.Dataset.map(batched=True) by as many processes: the same tokenizer, the ids of both
                           columns; without reading the JSONL file
  map_load_seconds         reading the file before that, Dataset.from_json
  map_pairs_per_second     pairs over map_seconds
  build_over_map           build_pairs_per_second / map_pairs_per_second
Ends with status 1 where a process of the build or the reader takes more than 2 GB.
"""
BOUND = 2 * 10**9
INSTRUCTION = "Given a question, retrieve passages that answer the question"
LIMIT, BATCH, BATCHES = 512, 1024, 50


def write_pairs(path: Path, tokenizer: Any, pairs: int) -> None:
    """Queries of 6 to 12 words and documents of 8 to 16; early words of the vocabulary are frequent (Zipf's law), and
    one word of twenty is a rare one: two joined, or with a number."""
    words = [piece[1:] for piece in tokenizer.get_vocab() if re.fullmatch("\u2581[a-z]{2,}", piece)]
    words = np.array(sorted(words, key=lambda word: tokenizer.convert_tokens_to_ids("\u2581" + word)), object)
    share = 1 / np.arange(1, len(words) + 1)
    share = np.cumsum(share) / share.sum()
    random = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for begin in range(0, pairs, 10_000):
            sizes = random.integers([6, 8], [13, 17], (min(10_000, pairs - begin), 2))
            drawn = words[np.searchsorted(share, random.random(sizes.sum()))]
            rare = np.flatnonzero(random.random(len(drawn)) < 0.05)
            drawn[rare] = [
                word + (str(number) if number % 2 else words[number % len(words)])
                for word, number in zip(drawn[rare], random.integers(0, 10**6, len(rare)).tolist(), strict=True)
            ]
            texts = [" ".join(one) for one in np.split(drawn, np.cumsum(sizes.ravel())[:-1])]
            for query, document in zip(texts[::2], texts[1::2], strict=True):
                file.write(json.dumps({"query": query, "pos": [document]}) + "\n")


class Peaks:
    """The most resident memory of this process's child and of all its children."""

    def __init__(self, pid: int) -> None:
        self._pid, self._stopped = pid, threading.Event()
        self.bytes: dict[int, int] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> list[int]:
        self._stopped.set()
        self._thread.join()
        return sorted(self.bytes.values(), reverse=True)

    def _watch(self) -> None:
        """The kernel keeps the peak, so that looking now and then misses only what a process does at its end."""
        while not self._stopped.wait(0.1):
            try:
                root = psutil.Process(self._pid)
                for one in [root, *root.children(recursive=True)]:
                    self.bytes[one.pid] = status_bytes("VmHWM", one.pid) or self.bytes.get(one.pid, 0)
            except psutil.NoSuchProcess:
                continue


def status_bytes(field: str, pid: int) -> int:
    """A line of /proc/PID/status; 0 for a process that ends."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def apart(work: Callable[[Path], dict[str, float]], room: Path) -> tuple[dict[str, float], list[int]]:
    """What `work` returns in a process of its own, and the peaks of that process and its children."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(work, room, sender))
    process.start()
    peaks = Peaks(process.pid)
    sender.close()
    figures = receiver.recv()
    process.join()
    return figures, peaks.stop()


def _send(work: Callable[[Path], dict[str, float]], room: Path, sender: Any) -> None:
    sender.send(work(room))


def dataset_of(room: Path) -> DatasetConfig:
    return DatasetConfig(path=str(room / "pairs.jsonl"), instruction=INSTRUCTION)


def build(room: Path) -> dict[str, float]:
    tokenizer = load_tokenizer(room / "tokenizer")
    limits = dict(max_query_tokens=LIMIT, max_document_tokens=LIMIT)
    begin = time.perf_counter()
    store = TokenStore.build(dataset_of(room), tokenizer, **limits, cache_dir=room / "stores")
    seconds = time.perf_counter() - begin
    return {
        "pairs": len(store),
        "tokens": store.statistics.tokens,
        "data_bytes": (room / "pairs.jsonl").stat().st_size,
        "store_bytes": sum(path.stat().st_size for path in store.folder.iterdir()),
        "build_seconds": seconds,
        "build_pairs_per_second": len(store) / seconds,
    }


def read(room: Path) -> dict[str, float]:
    (folder,) = (room / "stores").iterdir()
    TokenStore.open(folder)  # imports what it needs
    before, begin = status_bytes("VmRSS", os.getpid()), time.perf_counter()
    store = TokenStore.open(folder)
    seconds, after = time.perf_counter() - begin, status_bytes("VmRSS", os.getpid())
    config = DataConfig(tokenizer="", datasets=[dataset_of(room)])
    source = BatchSource(config, [store], batch_size=min(BATCH, len(store) // 2), seed=1, stage=1)
    begin = time.perf_counter()
    for step in range(BATCHES):
        source.batch(step)
    batch_seconds = (time.perf_counter() - begin) / BATCHES
    return {"open_seconds": seconds, "open_bytes": after - before, "batch_seconds": batch_seconds}


def map_with_datasets(room: Path) -> dict[str, float]:
    import datasets

    datasets.disable_progress_bars()
    tokenizer, prompt = load_tokenizer(room / "tokenizer"), query_prompt(INSTRUCTION)
    begin = time.perf_counter()
    table = datasets.Dataset.from_json(str(room / "pairs.jsonl"), cache_dir=str(room / "datasets"))
    load_seconds = time.perf_counter() - begin

    def tokenise(rows: dict[str, list]) -> dict[str, list]:
        how = dict(add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)
        documents = [text for texts in rows["pos"] for text in texts]
        return {
            "query_ids": tokenizer([prompt + text for text in rows["query"]], **how)["input_ids"],
            "pos_ids": tokenizer(documents, **how)["input_ids"],
        }

    begin = time.perf_counter()
    table = table.map(tokenise, batched=True, num_proc=os.cpu_count(), remove_columns=table.column_names)
    seconds = time.perf_counter() - begin
    return {
        "map_load_seconds": load_seconds,
        "map_seconds": seconds,
        "map_pairs_per_second": len(table) / seconds,
    }


def bench(room: Path, pairs: int, with_map: bool) -> dict[str, float]:
    write_mistral_tokenizer(room / "tokenizer")
    write_pairs(room / "pairs.jsonl", load_tokenizer(room / "tokenizer"), pairs)
    figures, peaks = apart(build, room)
    figures |= {f"build_peak_bytes_{number}": one for number, one in enumerate(peaks)}
    found, (peak, *_) = apart(read, room)
    figures |= found | {"read_peak_bytes": peak}
    if with_map:
        figures |= apart(map_with_datasets, room)[0]
        figures["build_over_map"] = figures["build_pairs_per_second"] / figures["map_pairs_per_second"]
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=FIGURES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=500_000, help="pairs of the generated set (default: 500,000)")
    parser.add_argument("--no-map", action="store_true", help="leave out the comparison with datasets.map")
    parser.add_argument("--room", type=Path, help="folder for everything that is written (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures to PATH as one flat object")
    arguments = parser.parse_args()
    room = Path(tempfile.mkdtemp(prefix="nvembed-bench-", dir=arguments.room))
    try:
        figures = bench(room, arguments.pairs, not arguments.no_map)
    finally:
        shutil.rmtree(room)
    for name, value in figures.items():
        print(f"{name:>24} {value:>18,.{3 if isinstance(value, float) else 0}f}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    peaks = [value for name, value in figures.items() if "_peak_bytes" in name]
    return 1 if max(peaks) > BOUND else 0


if __name__ == "__main__":
    raise SystemExit(main())
