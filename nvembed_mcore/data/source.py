"""Which texts make the global batch of a step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from nvembed_mcore.config import DataConfig
from nvembed_mcore.data import blend
from nvembed_mcore.data.batch import Batch, Sample, make_batch
from nvembed_mcore.data.blend import Blend, choose_negatives, choose_positives, chosen_record
from nvembed_mcore.data.packing import Text
from nvembed_mcore.data.tokens import TokenStore
from nvembed_mcore.exits import StorageError


class BatchSource:
    """Global batches by step number: a pure function of the stores, the blend's seed and the step."""

    def __init__(self, config: DataConfig, stores: Sequence[TokenStore], *, batch_size: int, seed: int, stage: int):
        """
        Args:
            config: the run's data sets, in the order of `stores`.
            batch_size: queries in a global batch.
            seed, stage: enter the order of the samples.

        Raises:
            ValueError: a batch would hold a record twice.
        """
        self.datasets, self.stores = config.datasets, list(stores)
        self.seed, self.stage = seed, stage
        self.fingerprint = fingerprint_of(stores)
        self.sizes = used_records(config, [len(store) for store in stores])
        self.blend = make_blend(config, self.sizes, batch_size, seed, stage, self.fingerprint)

    def batch(self, step: int) -> Batch:
        """The batch of optimizer step `step`, counted from 0.

        Raises:
            StorageError: a store cannot be read, or is not the one that was opened.
        """
        for store in self.stores:
            store.check()
        return make_batch([self._sample(drawn) for drawn in self.blend.samples(step)])

    def trouble(self) -> StorageError | None:
        """What keeps this process from making another batch, as far as the files' sizes and times tell."""
        try:
            for store in self.stores:
                store.check()
        except StorageError as error:
            return error
        return None

    def record_of(self, drawn: blend.Sample) -> int:
        """Number of a drawn record in the store of its data set."""
        return chosen_record(drawn.index, self.sizes[drawn.dataset], len(self.stores[drawn.dataset]))

    def _sample(self, drawn: blend.Sample) -> Sample:
        dataset, store = self.datasets[drawn.dataset], self.stores[drawn.dataset]
        example = store.example(self.record_of(drawn))
        chance = dict(seed=self.seed, stage=self.stage, sample=drawn)
        positives = choose_positives(len(example.positives), dataset.num_positives, **chance)
        negatives = choose_negatives(len(example.negatives), dataset.num_negatives, **chance)
        passages = [example.positives[number] for number in positives]
        passages += [example.negatives[number] for number in negatives]
        scores = None
        if example.positive_scores is not None:
            scores = np.concatenate([example.positive_scores[positives], example.negative_scores[negatives]])
        return Sample(
            query=Text(example.query, example.query_pooled_from),
            passages=[Text(tokens, example.document_pooled_from) for tokens in passages],
            passage_ids=np.concatenate([example.positive_ids[positives], example.negative_ids[negatives]]),
            positive_ids=example.positive_ids,
            in_batch=dataset.uses_in_batch_negatives,
            num_positives=len(positives),
            dataset=drawn.dataset,
            teacher_scores=scores,
        )


def used_records(config: DataConfig, counts: Sequence[int]) -> list[int]:
    """Of the records of each data set, how many a run uses: at most `max_records`."""
    limits = [dataset.max_records for dataset in config.datasets]
    return [count if limit is None else min(count, limit) for count, limit in zip(counts, limits, strict=True)]


def make_blend(
    config: DataConfig, sizes: Sequence[int], batch_size: int, seed: int, stage: int, fingerprint: str
) -> Blend:
    """The blend of a run whose data sets use `sizes` records.

    Raises:
        ValueError: a batch would hold a record twice.
    """
    return Blend(
        sizes,
        [dataset.weight for dataset in config.datasets],
        batch_size,
        seed,
        stage,
        fingerprint,
        temperature=config.blend_temperature,
        one_dataset_batches=config.one_dataset_batches,
        names=[dataset.path for dataset in config.datasets],
    )


def fingerprint_of(stores: Sequence[TokenStore]) -> str:
    """One name for all data of a run: the stores' fingerprints in order."""
    return hashlib.sha256("\n".join(store.fingerprint for store in stores).encode()).hexdigest()[:32]
