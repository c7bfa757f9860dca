"""The texts of one request among the replicas of a model, in blocks that do not depend on how many there are.

Texts are sorted by length, the longest first, and cut into blocks; blocks are dealt to the replicas in turn. Each
block is packed by itself, so that a text gets the same bits from one process and from a hundred.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nvembed_mcore import device
from nvembed_mcore.evaluation.embedders import Embedder

BLANK = "."
"""What is embedded for a text of nothing but spaces. Benchmarks have a few, and the trainer refuses them."""

_CHARACTERS_PER_TOKEN = 4
_USUAL_TOKENS = 512
_PACKS_PER_BLOCK = 4


@dataclass(frozen=True)
class Request:
    """Texts to embed, each once.

    Attributes:
        instruction: the task in one sentence, empty for none; None: the model's own for queries or documents.
        is_query: whether the limit of queries holds, and not that of documents.
    """

    texts: list[str]
    instruction: str | None
    is_query: bool


def characters_per_block(tokens_per_pack: int) -> int:
    """How many characters make a block of about four packs."""
    return _PACKS_PER_BLOCK * _CHARACTERS_PER_TOKEN * tokens_per_pack


def blocks_of(texts: list[str], max_tokens: int, characters: int) -> list[list[int]]:
    """Places of texts, the longest first, in blocks of at most `characters`, or of one text.

    A text counts as no longer than `max_tokens` are likely to be, for the rest is cut off.
    """
    sizes = [min(len(text), _CHARACTERS_PER_TOKEN * max_tokens) for text in texts]
    found: list[list[int]] = []
    room = 0
    for place in sorted(range(len(texts)), key=lambda place: -len(texts[place])):
        if not found or sizes[place] > room:
            found.append([])
            room = characters
        found[-1].append(place)
        room -= sizes[place]
    return found


def embed_share(
    embedder: Embedder, request: Request, characters: int, done: Callable[[int], None] = lambda texts: None
) -> tuple[list[int], np.ndarray] | None:
    """This replica's part of a request; all processes of a replica call this.

    Args:
        characters: of a block.
        done: told the number of texts after each block.

    Returns:
        The places of the texts and their unit vectors, float32 [texts, D], from the replica's writer; None elsewhere.
    """
    limit = embedder.facts(request.is_query)["max_tokens"] or _USUAL_TOKENS
    own = blocks_of(request.texts, limit, characters)[embedder.replica :: embedder.num_replicas]
    parts = []
    for block in own:
        texts = [request.texts[place] if request.texts[place].strip() else BLANK for place in block]
        parts.append(embedder.embed(texts, request.is_query, request.instruction))
        # Packs differ in length, so on a CPU the heap fills with gaps and grows unless released.
        device.release_unused_memory()
        done(len(block))
    if not embedder.is_writer:
        return None
    rows = np.concatenate(parts) if parts else np.empty((0, embedder.dim), np.float32)
    return [place for block in own for place in block], rows


def assemble(parts: list[tuple[list[int], np.ndarray] | None], dim: int) -> np.ndarray:
    """What `embed_share` returned on all processes, in the order of the texts: float32 [texts, dim]."""
    shares = [part for part in parts if part is not None]
    found = np.empty((sum(len(places) for places, _ in shares), dim), np.float32)
    for places, rows in shares:
        found[places] = rows
    return found
