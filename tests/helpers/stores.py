"""A token store without a file, for what is proved of the order of samples alone."""

from __future__ import annotations

import numpy as np

from nvembed_mcore.data.tokens import Example


class Numbers:
    """A store of `count` examples: example `i` has the query `i` and the positive `i`, of a few tokens each."""

    def __init__(self, count: int, fingerprint: str = "numbers") -> None:
        self.count, self.fingerprint = count, fingerprint

    def __len__(self) -> int:
        return self.count

    def check(self) -> None:
        """Numbers never change."""

    def example(self, index: int) -> Example:
        query, positive = (np.full(1 + index % divisor, index, np.int32) for divisor in (5, 7))
        ids = np.array([index], np.int64)
        return Example(query, 0, [positive], [], 0, ids, ids[:0])
