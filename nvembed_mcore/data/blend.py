"""Which samples make a step: a pure function of (seed, stage, step, fingerprint), in constant time and memory.

Nothing here depends on the number of ranks and nothing has to be saved but the step. Three parts do it:

- **Shares.** Each sample goes down a binary tree with the data sets as leaves (each batch, where it comes from one
  data set); of the first `n` that reach a node, `round(n * left / (left + right))` went left, in exact integers. So
  how often each data set was drawn before sample `g` is a formula; the counts sum to `g`, never fall, and (the tree
  is Huffman's) stay within 2 of the ideal share for any number of data sets.
- **Order.** Draw `k` of a data set is position `k % size` of epoch `k // size`, and a keyed permutation turns a
  position into a record without a table: a Feistel network on `a x b >= size` numbers with cycle walking
  (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
- **Distance.** An epoch permutes inside fixed blocks, small enough that no record is drawn twice within one batch even
  where a batch holds the end of an epoch and the beginning of the next.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction

_ROUNDS = 6
_SHARE_DIGITS = 9


@dataclass(frozen=True, slots=True)
class Sample:
    """One draw: record `index` of data set `dataset`, in the data set's pass number `epoch` (from 0)."""

    dataset: int
    index: int
    epoch: int


@dataclass(frozen=True, slots=True)
class _Turn:
    """One node of the tree on the way to a data set: samples go left with the share `left / total`."""

    left: int
    total: int
    goes_left: bool

    def passed(self, count: int) -> int:
        """Of `count` samples that reached the node, those that went this way."""
        left = (2 * count * self.left + self.total) // (2 * self.total)
        return left if self.goes_left else count - left

    def most(self, window: int) -> int:
        """The most that any `window` consecutive samples send this way."""
        share = self.left if self.goes_left else self.total - self.left
        return -(-window * share // self.total)


class Blend:
    """The endless sequence of batches over several data sets.

    Attributes:
        shares: of each data set, as parts of 1.

    Args:
        sizes: records of each data set.
        weights: share of each data set relative to the others; None stands for `share_of_size(size, temperature)`.
        batch_size: samples of a step, over all ranks.
        seed: seed of the run.
        stage: stage of the run; another stage has another order.
        fingerprint: names the data; other data have another order.
        temperature: of the shares by size; 1 is by size, large is the same for each.
        one_dataset_batches: whether all samples of a step come from one data set.
        names: how messages call the data sets; None: by their numbers.

    Raises:
        ValueError: no data set, an empty one, a weight that is not a positive number, or a batch so large that it
            would hold a record twice.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        weights: Sequence[float | None],
        batch_size: int,
        seed: int,
        stage: int,
        fingerprint: str,
        *,
        temperature: float = 1.0,
        one_dataset_batches: bool = False,
        names: Sequence[str] | None = None,
    ) -> None:
        names = [str(dataset) for dataset in range(len(sizes))] if names is None else names
        _check(sizes, weights, batch_size, names)
        self._sizes = tuple(sizes)
        self._batch_size = batch_size
        # Samples that go down the tree together.
        self._together = batch_size if one_dataset_batches else 1
        self._identity = (seed, stage, fingerprint)
        shares = [
            share_of_size(size, temperature) if weight is None else Fraction(weight)
            for size, weight in zip(sizes, weights, strict=True)
        ]
        self.shares = [share / sum(shares) for share in shares]
        self._paths = _tree_paths(shares)
        self._blocks = []
        for dataset, (size, path) in enumerate(zip(self._sizes, self._paths, strict=True)):
            most = batch_size // self._together
            for turn in path:
                most = turn.most(most)
            most *= self._together
            if most > size:
                raise ValueError(
                    f"a batch of {batch_size} takes up to {most} records of data set {names[dataset]}, which has "
                    f"{size}: lower batch_size{'' if one_dataset_batches else ' or its weight'}"
                )
            # Records of one block come back at least `size - block + 1` draws later.
            self._blocks.append(size if most <= 1 else min(size - most + 1, -(-size // 2)))

    def drawn(self, step: int) -> list[int]:
        """Draws from each data set before `step` (counted from 0); they sum to `step * batch_size`."""
        counts = []
        for path in self._paths:
            count = step * self._batch_size // self._together
            for turn in path:
                count = turn.passed(count)
            counts.append(count * self._together)
        return counts

    def samples(self, step: int) -> list[Sample]:
        """The global batch of `step` (counted from 0), in order; no sample is in it twice.

        Raises:
            ValueError: `step` is negative.
        """
        if step < 0:
            raise ValueError(f"step must not be negative, got {step}")
        ordered = [
            self._draw(dataset, number)
            for dataset, (first, end) in enumerate(zip(self.drawn(step), self.drawn(step + 1), strict=True))
            for number in range(first, end)
        ]
        key = _key("batch", *self._identity, step)
        return [ordered[_permuted(position, self._batch_size, key)] for position in range(self._batch_size)]

    def _draw(self, dataset: int, number: int) -> Sample:
        """Draw `number` (from 0) of a data set."""
        size = self._sizes[dataset]
        epoch, position = divmod(number, size)
        block, offset = divmod(position, self._blocks[dataset])
        start = block * self._blocks[dataset]
        length = min(self._blocks[dataset], size - start)
        place = start + _permuted(offset, length, _key("epoch", *self._identity, dataset, epoch, block))
        return Sample(dataset, _permuted(place, size, _key("order", *self._identity, dataset)), epoch)


def share_of_size(size: int, temperature: float) -> Fraction:
    """The share `size ** (1 / temperature)` of a data set, a number that is the same on every machine.

    C libraries differ in the last bit of a power, and one bit of a share moves samples. So the power is Python's own
    decimal arithmetic, defined to the digit, and is cut to nine digits. At temperature 1 it is `size` itself.
    """
    if temperature == 1:
        return Fraction(size)
    with localcontext() as context:
        context.prec = 3 * _SHARE_DIGITS
        power = Decimal(size) ** (1 / Decimal(temperature))
        context.prec = _SHARE_DIGITS
        return Fraction(+power)


def chosen_record(index: int, num_chosen: int, num_records: int) -> int:
    """Record `index` of the `num_chosen` that stand for a data set of `num_records`, 0 <= index < num_chosen.

    The choice follows from `num_records` alone, so it is the same in every stage, for every seed, prompt and
    tokenizer; of fewer records it is a part of that of more. All of them keep their numbers.
    """
    return index if num_chosen >= num_records else _permuted(index, num_records, _key("chosen", num_records))


def choose_negatives(num_available: int, num_wanted: int, *, seed: int, stage: int, sample: Sample) -> list[int]:
    """Which hard negatives a sample uses: at most `num_wanted` different numbers below `num_available`.

    Each sample has its own fixed shuffle of its negatives and takes the next `num_wanted` of it, around in a circle,
    in each epoch: consecutive epochs use different sets, and over the epochs all negatives are used equally often.

    Raises:
        ValueError: a number is negative.
    """
    if num_available < 0 or num_wanted < 0:
        raise ValueError(f"negatives available and wanted must not be negative, got {num_available} and {num_wanted}")
    if num_available <= num_wanted:
        return list(range(num_available))
    return _next_in_circle("negatives", num_available, num_wanted, seed, stage, sample)


def choose_positives(num_available: int, num_wanted: int, *, seed: int, stage: int, sample: Sample) -> list[int]:
    """Which of its positives a sample uses: at most `num_wanted` different ones.

    As with negatives, consecutive epochs use different ones, and all equally often.

    Raises:
        ValueError: there is none, or none is wanted.
    """
    if num_available < 1 or num_wanted < 1:
        raise ValueError(f"a sample needs at least one positive, got {num_available} of which {num_wanted} are wanted")
    if num_available <= num_wanted:
        return list(range(num_available))
    return _next_in_circle("positive", num_available, num_wanted, seed, stage, sample)


def _next_in_circle(what: str, available: int, wanted: int, seed: int, stage: int, sample: Sample) -> list[int]:
    key = _key(what, seed, stage, sample.dataset, sample.index)
    first = sample.epoch * wanted
    return [_permuted((first + i) % available, available, key) for i in range(wanted)]


def _check(sizes: Sequence[int], weights: Sequence[float | None], batch_size: int, names: Sequence[str]) -> None:
    if not sizes or len(sizes) != len(weights):
        raise ValueError(f"a blend needs data sets with a weight each, got {len(sizes)} sizes, {len(weights)} weights")
    for name, size, weight in zip(names, sizes, weights, strict=True):
        if size < 1:
            raise ValueError(f"data set {name} must have at least 1 record, got {size}")
        if weight is not None and not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"the weight of data set {name} must be a number above 0, got {weight}")
    if not 1 <= batch_size <= sum(sizes):
        raise ValueError(f"batch_size must be between 1 and the {sum(sizes)} records of the data, got {batch_size}")


def _tree_paths(shares: Sequence[Fraction]) -> list[tuple[_Turn, ...]]:
    """For each data set the turns from the root of a Huffman tree to it.

    An inner node of such a tree takes at most 2/3 of its parent (its sibling was not smaller than the larger of its
    children). Each turn rounds by at most 1/2, and turns below it shrink that error by their shares, so a data set is
    off by less than (1 + 1 + 2/3 + (2/3)^2 + ...) / 2 = 2.
    """
    scale = math.lcm(*(share.denominator for share in shares))
    heap = [(int(share * scale), dataset, [dataset]) for dataset, share in enumerate(shares)]
    heapq.heapify(heap)
    paths: list[list[_Turn]] = [[] for _ in shares]
    while len(heap) > 1:
        right_weight, _, right = heapq.heappop(heap)
        left_weight, number, left = heapq.heappop(heap)
        total = left_weight + right_weight
        for dataset in left:
            paths[dataset].append(_Turn(left_weight, total, goes_left=True))
        for dataset in right:
            paths[dataset].append(_Turn(left_weight, total, goes_left=False))
        heapq.heappush(heap, (total, number, left + right))
    return [tuple(reversed(path)) for path in paths]


def _key(*parts: str | int) -> bytes:
    """A key of 32 bytes for a permutation; JSON keeps ("a", 12) and ("a1", 2) apart."""
    return hashlib.sha256(json.dumps(parts).encode()).digest()


def _permuted(value: int, size: int, key: bytes) -> int:
    """The image of `value` under the permutation of [0, size) that `key` names."""
    if size == 1:
        return 0
    columns = math.isqrt(size - 1) + 1
    rows = -(-size // columns)
    while True:
        row, column = divmod(value, columns)
        for number in range(0, _ROUNDS, 2):
            column = (column + _round(row, number, key)) % columns
            row = (row + _round(column, number + 1, key)) % rows
        value = row * columns + column
        # Outside [0, size) the walk along the cycle goes on; it must come back, at the latest to where it began.
        if value < size:
            return value


def _round(half: int, number: int, key: bytes) -> int:
    """The round function of the network: 64 bits that depend on all its arguments."""
    digest = hashlib.blake2b(half.to_bytes(8, "little") + bytes([number]), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "little")
