"""A step whose loss or gradient is not a number: what is told of it, and to whom it points.

Such a step changes nothing. Its embeddings are made once more, by the same weights and random numbers, to see which
are not finite. Vectors of unit length have a finite loss at every temperature above 0, so what is not finite begins in
an embedding, in the weights, or in the backward pass.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nvembed_mcore import device
from nvembed_mcore.config import RunConfig
from nvembed_mcore.data.batch import Batch
from nvembed_mcore.data.packing import Plan
from nvembed_mcore.data.source import BatchSource
from nvembed_mcore.data.tokenizer import load_tokenizer
from nvembed_mcore.exits import Exit
from nvembed_mcore.parallel.gather import gather_rows, share_from_last_stage, smallest_on_all
from nvembed_mcore.parallel.groups import Groups, first_rank_does
from nvembed_mcore.status import write_json

log = logging.getLogger(__name__)

QUERY_TOKENS = 32
"""So much of a query is written, for a reader to know it by."""


@dataclass(frozen=True)
class Finding:
    """What was not finite, the same on every rank.

    Attributes:
        step: number of the optimizer step, from 1.
        loss, grad_norm: of the step; one of them is not finite.
        suspects: ascending numbers of the batch's samples with an embedding that is not finite.
        num_samples: samples of the batch.
        all_texts: whether no embedding is finite.
        bad_weights: whether a weight is not finite, on any rank.
        moves_texts: whether the step also embedded moved texts (FGM), which are not made again.
    """

    step: int
    loss: float
    grad_norm: float
    suspects: list[int]
    num_samples: int
    all_texts: bool
    bad_weights: bool
    moves_texts: bool = False

    @property
    def verdict(self) -> str:
        """Where it begins, in a sentence."""
        if self.bad_weights:
            return "Some weights are not finite already (the ranks' logs name them): no sample did that"
        if self.all_texts:
            return "All texts have embeddings that are not finite: look at the weights and the setup, not at a sample"
        if self.suspects:
            count = f"{len(self.suspects)} of {self.num_samples} samples"
            return f"{count} have embeddings that are not finite; the others' are finite"
        if not np.isfinite(self.loss) and self.moves_texts:
            return (
                "Made again as they are, all texts have finite embeddings: look at how far step.fgm_epsilon moves them"
            )
        if not np.isfinite(self.loss):
            return "Made again, all embeddings are finite: a fault that does not repeat, as of hardware"
        return "All weights and embeddings are finite: it begins in the backward pass"


class NonFiniteLossError(RuntimeError):
    """The loss of a step, or its gradient, is not a number; the step changed nothing. Raised on every rank."""

    exit_status = Exit.NON_FINITE

    def __init__(self, finding: Finding, samples: str = "") -> None:
        """Args: samples: where the batch is written down."""
        super().__init__(
            f"step {finding.step}: the loss is {finding.loss}, the norm of its gradient {finding.grad_norm}; no "
            f"weight was changed by this step. {finding.verdict}{samples}"
        )
        self.finding = finding


def find(
    step: int,
    loss: float,
    grad_norm: float,
    *,
    batch: Batch,
    plan: Plan,
    embeddings: list[torch.Tensor],
    parameters: list[tuple[str, torch.Tensor]],
    groups: Groups,
    moves_texts: bool = False,
) -> Finding:
    """Look for what is not finite; every rank calls this.

    Args:
        embeddings: of this rank's packs, float32 [texts of a pack, D] each, made again; empty off the last stage.
        parameters: this rank's, by name.
        moves_texts: whether the step has FGM.
    """
    bad = torch.zeros(len(batch.texts), 1, device=device.current())
    if groups.is_last_stage:
        mine = torch.cat([~part.isfinite().all(dim=1, keepdim=True) for part in embeddings])
        bad = gather_rows(mine.float(), plan.owned(), groups.dp)
    bad = share_from_last_stage(bad, groups).flatten().cpu().numpy() > 0
    names = [name for name, parameter in parameters if not parameter.isfinite().all()]
    if names:
        log.error("weights that are not finite on this rank: %s", ", ".join(names))
    sample_of = np.concatenate([np.arange(batch.num_queries), batch.passage_query])
    return Finding(
        step=step,
        loss=loss,
        grad_norm=grad_norm,
        suspects=np.unique(sample_of[bad]).tolist(),
        num_samples=batch.num_queries,
        all_texts=bool(bad.all()),
        bad_weights=smallest_on_all(-float(len(names)), device.current()) < 0,
        moves_texts=moves_texts,
    )


def reported(error: NonFiniteLossError, config: RunConfig, source: BatchSource, batch: Batch) -> NonFiniteLossError:
    """The same error with the name of the file that holds the batch's samples; every rank calls this, rank 0 writes.

    A file that cannot be written changes nothing of the error but this.
    """
    path = Path(config.run_dir) / f"nonfinite-step-{error.finding.step:08d}.json"

    def write() -> str:
        try:
            write_json(path, _content(error.finding, config, source, batch))
        except (OSError, ValueError) as failure:
            return f". The samples of this batch could not be written to {path}: {failure}"
        return f". The samples of this batch are in {path}"

    return NonFiniteLossError(error.finding, first_rank_does(write))


def _content(finding: Finding, config: RunConfig, source: BatchSource, batch: Batch) -> dict[str, Any]:
    tokenizer = load_tokenizer(config.data.tokenizer)
    suspects = {*finding.suspects}
    samples = []
    for number, drawn in enumerate(source.blend.samples(finding.step - 1)):
        query = batch.texts[number]
        head = query.token_ids[query.pooled_from : query.pooled_from + QUERY_TOKENS]
        samples.append(
            {
                "suspect": number in suspects,
                "data": config.data.datasets[drawn.dataset].path,
                "store": str(source.stores[drawn.dataset].folder),
                "record": source.record_of(drawn),
                "pass": drawn.epoch,
                "query": tokenizer.decode(head.tolist(), skip_special_tokens=True),
            }
        )
    # Not as JSON numbers: NaN and infinity are none.
    numbers = {"loss": str(finding.loss), "grad_norm": str(finding.grad_norm)}
    return {"step": finding.step, **numbers, "verdict": finding.verdict, "samples": samples}
