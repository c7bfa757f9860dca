"""Token lengths of a few batches, as a run of a configuration will meet them.

They come from the first of these that is there: a file or a name that the caller gives, the token stores of the run,
its data files, lengths of MS MARCO.

Letters: `S` sampled steps, `N` texts of the largest of their batches, `Q` queries of a batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from nvembed_mcore.config import ConfigError, DataConfig, DatasetConfig, RunConfig
from nvembed_mcore.data.blend import share_of_size

if TYPE_CHECKING:
    from nvembed_mcore.data.tokens import TokenStore

STEPS = 8
"""Batches that are looked at, spread over the run."""
SHIPPED = Path(__file__).with_name("lengths.yaml")
_SAMPLED_RECORDS = 2000
_LARGEST_FILE = 256_000_000
"""Bytes of data that is read for a sample, or hashed to find its store."""
_PROMPT_TOKENS_A_WORD, _PROMPT_FRAME = 1.3, 7
"""`Instruct: ...`, a line break and `Query: ` around an instruction, where no tokenizer is at hand."""


@dataclass(frozen=True, eq=False)
class Lengths:
    """The texts of sampled batches, queries first, in the order of `data.batch.Batch`.

    Attributes:
        tokens: int64 [S, N], tokens of each text; 0 where a batch has fewer texts.
        query: int64 [S, N], number of the query that each text belongs to; of a query its own.
        is_positive: bool [S, N], whether a text is a positive.
        source: where the numbers come from, for the reader of a plan.
    """

    tokens: np.ndarray
    query: np.ndarray
    is_positive: np.ndarray
    source: str


Record = tuple[int, list[int], list[int]]
"""Tokens of a query, of its positives and of its hard negatives."""


def sample_lengths(config: RunConfig, given: str | None = None) -> Lengths:
    """Lengths of batches of the run.

    Args:
        given: a name in `lengths.yaml`, or a JSON file `{"query": {length: count, ...}, "document": {...}}`.

    Raises:
        ConfigError: there is no such name or file, or it holds something else.
        DataError: what the run's data folders hold cannot be read.
    """
    if given is not None:
        pool, source = _given(given, config)
        return _drawn(config, [pool] * len(config.data.datasets), [None] * len(config.data.datasets), source)
    from nvembed_mcore.data.source import BatchSource

    data = config.data
    stores = [_store_of(data, dataset) for dataset in data.datasets]
    if all(stores):
        batches = BatchSource(data, stores, batch_size=config.batch_size, seed=config.seed, stage=config.stage)
        steps = np.unique(np.linspace(0, config.steps - 1, STEPS).astype(int)).tolist()
        return of_batches([batches.batch(step) for step in steps], f"{len(steps)} batches of the run's token stores")
    pools, sources = [], {}
    for dataset, store in zip(data.datasets, stores, strict=True):
        pool, source = _of_store(store) if store else _of_files(data, dataset) or _given("ms_marco", config)
        pools.append(pool)
        sources.setdefault(source, []).append(dataset.path)
    sizes = [_size_of(dataset, store) for dataset, store in zip(data.datasets, stores, strict=True)]
    names = {source: ", ".join(paths) if len(paths) < 4 else f"{len(paths)} sets" for source, paths in sources.items()}
    return _drawn(config, pools, sizes, "; ".join(f"{paths}: {source}" for source, paths in names.items()))


def of_batches(batches: Sequence[Any], source: str) -> Lengths:
    """Those of batches as the trainer makes them (`data.batch.Batch`)."""
    return _laid_out(
        [
            (
                batch.lengths,
                np.concatenate([np.arange(batch.num_queries), batch.passage_query]),
                np.concatenate([np.zeros(batch.num_queries, dtype=bool), batch.is_positive]),
            )
            for batch in batches
        ],
        source,
    )


def _laid_out(steps: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]], source: str) -> Lengths:
    """Steps of different numbers of texts in one array each: tokens, query, whether it is a positive."""
    found = [
        np.zeros((len(steps), max(len(step[0]) for step in steps)), dtype) for dtype in (np.int64, np.int64, bool)
    ]
    for number, step in enumerate(steps):
        for array, values in zip(found, step, strict=True):
            array[number, : len(values)] = values
    return Lengths(*found, source)


Pool = Callable[[np.random.Generator, DatasetConfig], Record]
"""Draws a record of a data set."""


def _drawn(config: RunConfig, pools: Sequence[Pool], sizes: Sequence[int | None], source: str) -> Lengths:
    """Batches drawn from pools, one a data set, by the shares of the blend; the same in every call."""
    data, random = config.data, np.random.default_rng(0)
    shares = _shares(data, sizes)
    steps = []
    for _ in range(STEPS):
        if data.one_dataset_batches:
            chosen = np.full(config.batch_size, random.choice(len(pools), p=shares))
        else:
            chosen = random.choice(len(pools), size=config.batch_size, p=shares)
        records = [pools[number](random, data.datasets[number]) for number in chosen]
        counts = [len(positives) + len(negatives) for _, positives, negatives in records]
        tokens = [query for query, _, _ in records] + [one for _, *more in records for some in more for one in some]
        is_positive = [
            place < len(positives) for _, positives, rest in records for place in range(len(positives + rest))
        ]
        owners = np.arange(config.batch_size)
        steps.append(
            (
                np.array(tokens),
                np.concatenate([owners, np.repeat(owners, counts)]),
                np.array([False] * config.batch_size + is_positive),
            )
        )
    return _laid_out(steps, source)


def _shares(data: DataConfig, sizes: Sequence[int | None]) -> np.ndarray:
    """Shares of the blend; a data set of unknown size without a weight has `max_records`, or else one record."""
    weights = []
    for dataset, size in zip(data.datasets, sizes, strict=True):
        used = min(size or math.inf, dataset.max_records or math.inf)
        by_size = share_of_size(int(used) if used < math.inf else 1, data.blend_temperature)
        weights.append(float(by_size if dataset.weight is None else dataset.weight))
    return np.array(weights) / sum(weights)


def _size_of(dataset: DatasetConfig, store: TokenStore | None) -> int | None:
    """Records of a data set, if its store or its data are here."""
    from nvembed_mcore.data.plan import count_records

    return len(store) if store else count_records(dataset.path)


def _given(name: str, config: RunConfig) -> tuple[Pool, str]:
    """A pool of a shipped name or of a JSON file with histograms."""
    shipped = yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))
    if name in shipped:
        entry = shipped[name]
        draws = {kind: _log_normal(**entry[kind]) for kind in ("query", "document")}
        return _texts(config, draws, with_prompt=True), f"{name} ({entry['source']})"
    draws = {kind: _histogram(Path(name), kind, sorted(shipped)) for kind in ("query", "document")}
    return _texts(config, draws, with_prompt=False), f"the histograms in {name}"


Draw = Callable[[np.random.Generator, int], np.ndarray]


def _log_normal(mean: float, p95: float) -> Draw:
    """`mean = exp(m + s^2 / 2)`, `p95 = exp(m + 1.645 s)`: the smaller `s` of the two that solve both."""
    ratio = math.log(p95 / mean)
    width = 1.645 - math.sqrt(max(0.0, 1.645**2 - 2 * ratio))
    middle = math.log(mean) - width**2 / 2
    return lambda random, count: np.rint(random.lognormal(middle, width, count)).astype(np.int64)


def _histogram(file: Path, kind: str, names: list[str]) -> Draw:
    if not file.is_file():
        raise ConfigError(f"no file of lengths at {file}, nor is that one of {', '.join(names)}")
    try:
        counts = {int(length): float(count) for length, count in json.loads(file.read_text("utf-8"))[kind].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'{file}: {kind!r} must be {{"length": count, ...}}: {error!r}') from error
    if not counts or min(counts) < 1 or min(counts.values()) < 0 or not 0 < sum(counts.values()) < math.inf:
        raise ConfigError(f"{file}: {kind!r} must have lengths of at least 1 and counts above 0")
    lengths, weights = np.array(list(counts)), np.array(list(counts.values()))
    return lambda random, count: random.choice(lengths, size=count, p=weights / weights.sum())


def _texts(config: RunConfig, draws: dict[str, Draw], *, with_prompt: bool) -> Pool:
    """Records of as many texts as a data set uses.

    Args:
        with_prompt: the lengths are those of bare texts, and what stands before them is added.
    """
    limits = {"query": config.data.max_query_tokens, "document": config.data.max_document_tokens}

    def draw(random: np.random.Generator, dataset: DatasetConfig, kind: str, count: int) -> list[int]:
        carries = kind == "query" or dataset.instructs_documents
        prompt = _prompt_tokens(dataset.instruction) if with_prompt and carries else 0
        return np.clip(draws[kind](random, count) + prompt, 3, limits[kind]).tolist()

    def record(random: np.random.Generator, dataset: DatasetConfig) -> Record:
        (query,) = draw(random, dataset, "query", 1)
        positives, negatives = dataset.num_positives, dataset.num_negatives
        documents = draw(random, dataset, "document", positives + negatives)
        return query, documents[:positives], documents[positives:]

    return record


def _prompt_tokens(instruction: str) -> int:
    return round(_PROMPT_TOKENS_A_WORD * len(instruction.split())) + _PROMPT_FRAME if instruction else 0


def _of_records(records: list[Record]) -> Pool:
    """Records as they are, with at most as many documents as a data set uses."""

    def record(random: np.random.Generator, dataset: DatasetConfig) -> Record:
        query, positives, negatives = records[random.integers(len(records))]
        return query, positives[: dataset.num_positives], negatives[: dataset.num_negatives]

    return record


def _of_store(store: TokenStore) -> tuple[Pool, str]:
    chosen = np.unique(np.linspace(0, len(store) - 1, _SAMPLED_RECORDS).astype(int)).tolist()
    examples = [store.example(index) for index in chosen]
    records = [(len(one.query), [*map(len, one.positives)], [*map(len, one.negatives)]) for one in examples]
    return _of_records(records), f"{len(records)} records of its token store"


def _store_of(data: DataConfig, dataset: DatasetConfig) -> TokenStore | None:
    """The token store of a data set, if it is there: the one with its prompts, its limits and, where several have
    these, its data."""
    from nvembed_mcore.data.prompts import query_prompt
    from nvembed_mcore.data.sources import source_fingerprint
    from nvembed_mcore.data.tokens import TokenStore

    wanted = {
        "query_prompt": query_prompt(dataset.instruction),
        "document_prompt": query_prompt(dataset.instruction if dataset.instructs_documents else ""),
        "max_query_tokens": data.max_query_tokens,
        "max_document_tokens": data.max_document_tokens,
    }
    folders = [path.parent for path in sorted(Path(data.cache_dir).glob("[!.]*/store.json"))]
    stores = [store for store in map(TokenStore.open, folders) if wanted.items() <= store.identity.items()]
    if stores and _is_small(dataset.path):
        found = source_fingerprint(dataset.path)
        stores = [store for store in stores if store.identity["data"] == found]
    return stores[0] if len(stores) == 1 else None


def _is_small(path: str) -> bool:
    place = Path(path)
    files = [place] if place.is_file() else [*place.iterdir()] if place.is_dir() else []
    return 0 < sum(file.stat().st_size for file in files if file.is_file()) <= _LARGEST_FILE


def _of_files(data: DataConfig, dataset: DatasetConfig) -> tuple[Pool, str] | None:
    """The first records of the data, tokenised; None where data or tokenizer are not here, or the data is large."""
    from nvembed_mcore.data.records import read_records
    from nvembed_mcore.data.token_build import Encoder

    tokenizer = _tokenizer(Path(data.tokenizer))
    if tokenizer is None or not _is_small(dataset.path):
        return None
    on_documents = dataset.instruction if dataset.instructs_documents else ""
    encoder = Encoder(tokenizer, dataset.instruction, on_documents, data.max_query_tokens, data.max_document_tokens)
    records: list[Record] = []
    for one in islice(read_records(dataset.path, max_bad_records=data.max_bad_records), _SAMPLED_RECORDS):
        (queries,) = encoder.queries([one])
        documents = encoder.documents([*one.pos, *one.neg]).lengths.tolist()
        records.append((int(queries.lengths[0]), documents[: len(one.pos)], documents[len(one.pos) :]))
    return _of_records(records), f"its first {len(records)} records"


def _tokenizer(folder: Path):
    """The tokenizer of a folder without transformers; None where there is none with both special tokens."""
    from nvembed_mcore.data.bare_tokenizer import BareTokenizer

    try:
        serialized = (folder / "tokenizer.json").read_text(encoding="utf-8")
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        ids = {one["content"]: one["id"] for one in json.loads(serialized)["added_tokens"]}
        words = [named[name] for name in ("bos_token", "eos_token")]
        begin, end = (ids[word["content"] if isinstance(word, dict) else word] for word in words)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return BareTokenizer(serialized, begin, end, bool(named.get("split_special_tokens")))
