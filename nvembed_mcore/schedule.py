"""Packs through the model: Megatron's pipeline schedule, and embeddings without a graph.

Letters: `N` texts, `n` texts of a pack, `D` embedding size, `W` data-parallel size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import numpy as np
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nvembed_mcore.data.packing import Pack, Plan, Split, Text, make_pack, make_plan
from nvembed_mcore.model.encoder import Encoder
from nvembed_mcore.parallel.gather import gather_rows
from nvembed_mcore.parallel.groups import Groups
from nvembed_mcore.progress import progress, show_each

Chunks = list[DistributedDataParallel] | list[Encoder]
"""The model chunks of this pipeline stage: one, or several where stages are interleaved. Bare ones can only embed."""


def pack_multiple(chunks: Chunks) -> int:
    """The token count of a pack, or of a context-parallel rank's part of it, is a multiple of this.

    Under sequence parallelism each tensor rank takes an equal part, and in FP8 each part has a size that its products
    take.
    """
    chunk, config = chunks[0], chunks[0].config
    alignment = (chunk if isinstance(chunk, Encoder) else chunk.module).backend.alignment
    is_split = config.sequence_parallel or alignment > 1
    return alignment * (config.tensor_model_parallel_size if is_split else 1)


def plan_texts(lengths, chunks: Chunks, groups: Groups, token_budget: int, num_ranks: int | None = None) -> Plan:
    """Which rank embeds which text in which pack; interleaved stages need a multiple of their number of packs.

    Args:
        num_ranks: those that share the texts; None: all data-parallel ones.
    """
    multiple = groups.pp_size if len(chunks) > 1 else 1
    return make_plan(lengths, num_ranks or groups.dp_size, token_budget, multiple=multiple, cp=groups.cp_size)


def packs_of_rank(
    texts: list[Text], plan: Plan, chunks: Chunks, groups: Groups, rank: int | None = None
) -> list[Pack]:
    """The packs of a data-parallel rank, or this context-parallel rank's parts of them.

    Args:
        rank: None: this one.
    """
    multiple, split = pack_multiple(chunks), Split(groups.cp_rank, groups.cp_size)
    rank = groups.dp_rank if rank is None else rank
    return [make_pack([texts[number] for number in numbers], multiple, split) for numbers in plan.packs[rank]]


def run_schedule(
    chunks: Chunks,
    packs: list[Pack],
    on_output: Callable[[int, Tensor], Tensor],
    *,
    forward_only: bool,
    reduces: bool = True,
    before_forward: Callable[[int, int], None] = lambda index, chunk: None,
) -> None:
    """Send packs through Megatron's pipeline schedule.

    Args:
        on_output: called on the last stage with a pack's index and its embeddings; returns the scalar whose gradient
            is wanted. Results are keyed by index, because a schedule need not call in order.
        forward_only: no backward. This alone does not switch autograd off.
        reduces: whether gradients are reduced over data-parallel ranks behind the last pack.
        before_forward: called with the index and the number of the chunk before each forward on every stage.
    """

    def forward_step(data: Iterator[tuple[int, Pack]], model: torch.nn.Module):
        index, pack = next(data)
        before_forward(index, next(number for number, chunk in enumerate(chunks) if chunk is model))
        return model(pack), lambda embeddings: (on_output(index, embeddings), {})

    # Every chunk walks through the same packs.
    iterators = [iter(enumerate(packs)) for _ in chunks]
    with nullcontext() if reduces else _unreduced(chunks):
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=len(packs),
            seq_length=max(len(pack.token_ids) for pack in packs),
            micro_batch_size=1,
            forward_only=forward_only,
        )


@contextmanager
def _unreduced(chunks: list[DistributedDataParallel]) -> Iterator[None]:
    """Gradients are added to those of this rank, and nothing is sent, whatever the schedule does at its end."""
    config = chunks[0].config  # that which the schedule reads
    kept = config.no_sync_func, config.finalize_model_grads_func
    config.no_sync_func = config.finalize_model_grads_func = None
    with ExitStack() as stack:
        for chunk in chunks:
            stack.enter_context(chunk.no_sync())
        try:
            yield
        finally:
            config.no_sync_func, config.finalize_model_grads_func = kept


@torch.no_grad()
def embed_packs(
    chunks: Chunks, packs: list[Pack], before_forward: Callable[[int, int], None] = lambda index, chunk: None
) -> list[Tensor]:
    """Embeddings of each pack, float32 [n, D], without a graph; empty off the last stage."""
    found: dict[int, Tensor] = {}

    def keep(index: int, embeddings: Tensor) -> Tensor:
        found[index] = embeddings
        return embeddings.new_zeros(())

    run_schedule(chunks, packs, keep, forward_only=True, before_forward=before_forward)
    return [found[index] for index in sorted(found)]


@contextmanager
def inference(chunks: Chunks) -> Iterator[None]:
    """Nothing is dropped in here."""
    was_training = chunks[0].training
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk in chunks:
            chunk.train(was_training)


def embed_texts(chunks: Chunks, groups: Groups, texts: list[Text], token_budget: int) -> Tensor | None:
    """Embeddings of many texts by all ranks together, for evaluation.

    Returns:
        float32 [N, D] in the given order on the last pipeline stage, None elsewhere.
    """
    plan = plan_texts([len(text) for text in texts], chunks, groups, token_budget)
    own = packs_of_rank(texts, plan, chunks, groups)
    with inference(chunks), progress("embed", len(own), "packs") as shown:
        embeddings = embed_packs(chunks, own, lambda index, chunk: shown.update(index))
    return gather_rows(torch.cat(embeddings), plan.owned(), groups.dp) if groups.is_last_stage else None


def embed_share(
    chunks: Chunks, groups: Groups, texts: list[Text], token_budget: int, rows: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """This data-parallel rank's share of many texts, embedded block by block; no rank ever has all of them.

    Every rank goes through to the end, those of other pipeline stages too, which get nothing. To be used in
    `inference`.

    Args:
        rows: texts of a block, at least, but for the last block; packs are not taken apart.

    Yields:
        float32 [n, D] and the numbers of the texts, int64 [n]; each text comes on one data-parallel rank, once.
    """
    plan = plan_texts([len(text) for text in texts], chunks, groups, token_budget)
    multiple = groups.pp_size if len(chunks) > 1 else 1
    block: list[np.ndarray] = []
    packs = plan.packs[groups.dp_rank]
    for place, pack in enumerate(show_each(packs, "embed", "packs"), 1):
        block.append(pack)
        if place == len(packs) or (sum(map(len, block)) >= rows and len(block) % multiple == 0):
            found = embed_packs(chunks, packs_of_rank(texts, Plan([block]), chunks, groups, rank=0))
            if groups.is_last_stage:
                yield torch.cat(found), torch.from_numpy(np.concatenate(block))
            block = []
