"""The second phase of a step: gather all embeddings, score them, and hand each rank `dL/dE` of its own.

Letters: `Q` queries, `M` passages, `N = Q + M` texts of the global batch (queries first), `n` texts of this rank, `R`
pairs of a query and a positive, `D` embedding size, `W` data-parallel size, `V` embeddings of each text (one, or with
R-Drop two).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nvembed_mcore import device
from nvembed_mcore.config import LossConfig
from nvembed_mcore.data.batch import Batch
from nvembed_mcore.distillation import share_of
from nvembed_mcore.kernels.reference import Columns, Masks, Rows, Softmax
from nvembed_mcore.loss import make_targets, score_columns, score_rows
from nvembed_mcore.parallel.gather import gather_rows, scatter_sum
from nvembed_mcore.parallel.groups import Groups
from nvembed_mcore.r_drop import diverge_columns, diverge_rows

FLOPS_PER_BYTE = {("cuda", torch.float32): 500, ("cuda", torch.bfloat16): 7000, ("cpu", torch.float32): 50}
"""Operations of a device in the time in which a byte crosses the network: 25 to 50 TFLOP/s of a GPU in float32 and 500
to 700 in bfloat16 against 50 to 100 GB/s; 80 GFLOP/s of a CPU core against 1 to 2 GB/s of gloo. Only the choice of
`auto` hangs on it."""


@dataclass(frozen=True)
class Scores:
    """What scoring gives a rank.

    Attributes:
        totals: float32: sum of the losses of its rows, and of the weights of queries whose positive is first; then,
            where there is distillation, the sum of its queries' divergences from the teacher, and with R-Drop that of
            its rows' divergences.
        grad: float32 [V, n, D]: gradient of each of its texts' embeddings, in the order of `plan.owned()`.
        grad_log_scale: float32 scalar: its rows' part of the gradient to the log of one over the temperature.
    """

    totals: Tensor
    grad: Tensor
    grad_log_scale: Tensor


@dataclass(frozen=True)
class _Direction:
    """One direction of the loss over the global batch, on the host.

    `anchor` int64 [R] and `candidate` int64 [C] are text numbers; `rows` and `columns` the arguments of
    `loss.make_targets` by name.
    """

    anchor: np.ndarray
    candidate: np.ndarray
    rows: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]

    def targets(self, rows: np.ndarray, columns: np.ndarray, masks: Masks) -> tuple[Rows, Columns]:
        """Targets of some rows and columns (int64 numbers), on this process's device."""
        chosen = {name: values[rows] for name, values in self.rows.items()}
        place = np.full(len(self.candidate), -1)
        place[columns] = np.arange(len(columns))
        chosen["positive"] = place[chosen["positive"]]
        others = {f"column_{name}": values[columns] for name, values in self.columns.items()}
        found = make_targets(**chosen, **others, masks=masks)
        return found[0].to(device.current()), found[1].to(device.current())


@dataclass(frozen=True)
class _OwnColumns:
    """Columns whose gradient a rank makes alone: all rows against them.

    `anchors` int64 [R], `candidates` int64 [c] are text numbers; `places` int64 [c], rows of the gradient.
    """

    anchors: Tensor
    candidates: Tensor
    places: Tensor
    targets: tuple[Rows, Columns]


@dataclass(frozen=True)
class _Share:
    """What a rank scores of one direction, whatever the number of dimensions.

    Attributes:
        anchors: int64 [a], text numbers of its rows.
        places: int64 [a], their rows of the gradient.
        candidates: text numbers of all columns.
        targets: of its rows and all columns.
        rows_of: for each rank the numbers of its rows.
        columns: where it makes its columns' gradients alone.
    """

    anchors: Tensor
    places: Tensor
    candidates: slice
    targets: tuple[Rows, Columns]
    rows_of: list[np.ndarray]
    columns: _OwnColumns | None


def _directions(batch: Batch, config: LossConfig) -> list[_Direction]:
    """Query among passages, and with `symmetric` positive among queries."""
    positive = np.flatnonzero(batch.is_positive)
    query = batch.passage_query[positive]
    of_pair = dict(
        query=query,
        weight=1.0 / np.bincount(query, minlength=batch.num_queries)[query],
        in_batch=batch.in_batch[query],
        dataset=batch.dataset[query],
    )
    passages = _Direction(
        anchor=query,
        candidate=batch.num_queries + np.arange(len(batch.passage_query)),
        rows=dict(**of_pair, positive=positive, documents=batch.positive_ids[query]),
        columns=dict(
            query=batch.passage_query,
            hard=~batch.is_positive,
            shared=batch.is_positive | config.share_hard_negatives,
            dataset=batch.dataset[batch.passage_query],
            documents=batch.passage_ids[:, None],
        ),
    )
    queries = _Direction(
        anchor=batch.num_queries + positive,
        candidate=np.arange(batch.num_queries),
        rows=dict(**of_pair, positive=query, documents=batch.passage_ids[positive][:, None]),
        columns=dict(
            query=np.arange(batch.num_queries),
            hard=np.zeros(batch.num_queries, dtype=bool),
            shared=np.ones(batch.num_queries, dtype=bool),
            dataset=batch.dataset,
            documents=batch.positive_ids,
        ),
    )
    return [passages, queries] if config.symmetric else [passages]


class Scorer:
    """The loss of a global batch and its gradient, the same in every layout as on one process."""

    def __init__(self, config: LossConfig, groups: Groups, gradient_exchange: str, weights: torch.dtype) -> None:
        """
        Args:
            gradient_exchange: `step.gradient_exchange` of the configuration.
            weights: dtype of the model's weights.
        """
        self.config, self.groups, self.exchange = config, groups, gradient_exchange
        self.views = 2 if config.r_drop_weight else 1
        # Where the model computes in bfloat16, `dL/dE` is rounded to it right behind the last norm. On CUDA, products
        # of float32 would take over ten times as long for what that leaves of them; on a CPU there is nothing to gain.
        self.products = weights if device.has_cuda() else torch.float32
        self.masks = Masks(
            same_document=config.mask_same_document,
            same_dataset_only=config.in_batch_from == "dataset",
            margin=config.false_negative_margin,
        )
        self.num_totals = 2 + config.distillation.is_on + (self.views == 2)

    @torch.no_grad()
    def __call__(self, batch: Batch, owned: list[np.ndarray], local: Tensor, temperature: float) -> Scores:
        """Score; the last pipeline stage's ranks of one data-parallel group call this together.

        Args:
            owned: for each rank the numbers of its texts, in the order in which it embedded them.
            local: float32 [V, n, D], unit vectors of this rank's texts.
            temperature: cosines are divided by this.
        """
        width = local.size(2)
        everything = gather_rows(local.transpose(0, 1).flatten(1), owned, self.groups.dp).split(width, dim=1)
        recompute = self._recomputes(batch, owned, width)
        directions = [
            self._share(direction, owned, len(batch.texts), recompute) for direction in _directions(batch, self.config)
        ]
        teacher, distilled = self.config.distillation, None
        if teacher.is_on:  # its weight undoes the division by the number of directions: it belongs to one of them
            how = dict(alone=recompute, weight=teacher.weight * len(directions))
            distilled = share_of(batch, owned, self.groups.dp_rank, teacher, **how)
        sizes, scale = [*self.config.matryoshka_dims, width], 1.0 / temperature
        terms = self.views * len(directions) * len(sizes)
        total, grad_log_scale = local.new_zeros(self.num_totals), local.new_zeros(())
        # Of all texts, to be summed over ranks; or complete, of this rank's texts.
        grads = [torch.zeros_like(local[0] if recompute else view) for view in everything]
        mine = torch.as_tensor(owned[self.groups.dp_rank], device=local.device) if recompute else slice(None)
        for size in sizes:
            leading = [_leading(view, size) for view in everything]
            vectors = [one for one, _ in leading]
            grad_vectors = [one.new_zeros(len(grads[0]), size) for one in vectors]
            for number, direction in enumerate(directions):
                loss, correct, apart, of_log_scale = self._score_views(direction, vectors, scale, grad_vectors)
                total[0] += loss / terms
                if number == 0 and size == width:
                    total[1] += correct / self.views
                if apart is not None:
                    total[-1] += apart * self.views / terms
                grad_log_scale += of_log_scale
            for one, part in zip(vectors, grad_vectors, strict=True) if distilled is not None else ():
                loss, of_log_scale = distilled.score_(one, scale, part)
                total[0] += teacher.weight * loss * len(directions) / terms
                total[2] += loss * len(directions) / terms
                grad_log_scale += of_log_scale
            for view, (unit, norms) in enumerate(leading):
                grad = grad_vectors[view]
                grads[view][:, :size] += grad if size == width else _through_norm(grad, unit[mine], norms[mine])
        if not recompute:
            grads = [self._to_owners(grad, owned) for grad in grads]
        # The one place where W appears (docs/design.md): data parallelism divides by it.
        factor = self.groups.dp_size / (batch.num_queries * terms)
        return Scores(total, torch.stack(grads).mul_(factor), grad_log_scale * factor)

    def _to_owners(self, grad: Tensor, owned: list[np.ndarray]) -> Tensor:
        """What all ranks say of their texts' embeddings [N, D], summed, of this rank's [n, D]."""
        if self.groups.dp_size > 1:
            return scatter_sum(grad, owned, self.groups.dp)
        return grad[torch.as_tensor(owned[0], device=grad.device)]

    def _score_views(
        self, share: _Share, vectors: list[Tensor], scale: float, grads: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Sums of `_score` over the embeddings of a text: losses, correct rows, and the gradient to log(scale).

        Behind the correct rows, with R-Drop, how far both disagree, which is in the losses with its weight.
        """
        sums = [self._score(share, one, scale, grad) for one, grad in zip(vectors, grads, strict=True)]
        loss, correct, grad_log_scale = map(sum, zip(*sums, strict=True))
        if self.views == 1:
            return loss, correct, None, grad_log_scale
        weight = self.config.r_drop_weight * self.views  # losses are divided by the number of views
        apart, of_log_scale = self._diverge(share, vectors, scale, grads, weight)
        return loss + weight * apart, correct, apart, grad_log_scale + weight * of_log_scale

    def _share(self, direction: _Direction, owned: list[np.ndarray], num_texts: int, recompute: bool) -> _Share:
        """This rank's part of a direction."""

        def on_device(numbers: np.ndarray) -> Tensor:
            return torch.as_tensor(numbers, device=device.current())

        holder = np.empty(num_texts, dtype=np.int64)  # of each text, its rank
        for rank, numbers in enumerate(owned):
            holder[numbers] = rank
        rows_of = [np.flatnonzero(holder[direction.anchor] == rank) for rank in range(len(owned))]
        candidate, rows = direction.candidate, rows_of[self.groups.dp_rank]
        anchor = direction.anchor[rows]
        place, columns = np.arange(num_texts), None  # of each text, its row of the gradient
        if recompute:
            mine = owned[self.groups.dp_rank]
            place = np.full(num_texts, -1)
            place[mine] = np.arange(len(mine))
            numbers = np.flatnonzero(place[candidate] >= 0)
            columns = _OwnColumns(
                anchors=on_device(direction.anchor),
                candidates=on_device(candidate[numbers]),
                places=on_device(place[candidate[numbers]]),
                targets=direction.targets(np.arange(len(direction.anchor)), numbers, self.masks),
            )
        return _Share(
            anchors=on_device(anchor),
            places=on_device(place[anchor]),
            candidates=slice(candidate[0], candidate[-1] + 1),
            targets=direction.targets(rows, np.arange(len(candidate)), self.masks),
            rows_of=rows_of,
            columns=columns,
        )

    def _score(self, share: _Share, vectors: Tensor, scale: float, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, correct rows and gradient to log(scale) of this rank's rows of one direction; adds to `grad`.

        `vectors` [N, d] of all texts. `grad` [N, d] takes this rank's part for all texts, or where it makes its own
        columns' gradients [n, d] everything for its own.
        """
        own = share.columns
        vectors = vectors.to(self.products)
        anchors, candidates = vectors[share.anchors], vectors[share.candidates]
        found = score_rows(anchors, candidates, *share.targets, self.masks, scale, with_columns=own is None)
        grad.index_add_(0, share.places, found.grad_rows)
        if own is None:
            grad[share.candidates] += found.grad_columns
        else:
            softmax = torch.stack([found.softmax.log_sum, found.softmax.of_positive], dim=1)
            softmax = Softmax(*gather_rows(softmax, share.rows_of, self.groups.dp).T.contiguous())
            anchors, candidates = vectors[own.anchors], vectors[own.candidates]
            columns = score_columns(anchors, candidates, *own.targets, self.masks, scale, softmax)
            grad.index_add_(0, own.places, columns)
        return found.loss, found.correct, found.grad_log_scale

    def _diverge(
        self, share: _Share, vectors: list[Tensor], scale: float, grads: list[Tensor], weight: float
    ) -> tuple[Tensor, Tensor]:
        """Divergence of this rank's rows of one direction, and its gradient to log(scale); adds `weight` times the
        gradients to both of `grads`. Arguments as those of `_score`, of both views."""
        own, masks = share.columns, self.masks
        pair = [one.to(self.products) for one in vectors]
        anchors, candidates = ([one[numbers] for one in pair] for numbers in (share.anchors, share.candidates))
        found = diverge_rows(anchors, candidates, *share.targets, masks, scale, with_columns=own is None)
        for grad, part in zip(grads, found.grad_rows, strict=True):
            grad.index_add_(0, share.places, part, alpha=weight)
        if own is None:
            for grad, part in zip(grads, found.grad_columns, strict=True):
                grad[share.candidates].add_(part, alpha=weight)
        else:
            of_rows = gather_rows(found.of_rows, share.rows_of, self.groups.dp)
            anchors, candidates = ([one[numbers] for one in pair] for numbers in (own.anchors, own.candidates))
            columns = diverge_columns(anchors, candidates, *own.targets, masks, scale, of_rows)
            for grad, part in zip(grads, columns, strict=True):
                grad.index_add_(0, own.places, part, alpha=weight)
        return found.total, found.grad_log_scale

    def _recomputes(self, batch: Batch, owned: list[np.ndarray], size: int) -> bool:
        """Whether each rank makes its texts' gradients alone; every rank decides alike, because all know the plan."""
        if self.exchange != "auto":
            return self.exchange == "recompute"
        if self.masks.margin is not None:
            return False  # a score computed twice may fall on both sides of the margin
        num_texts, ranks = len(batch.texts), self.groups.dp_size
        passages = max(int((numbers >= batch.num_queries).sum()) for numbers in owned)
        pairs = int(batch.is_positive.sum())
        bytes_saved = 4 * num_texts * size * (ranks - 1) / ranks
        # Two products of all rows with its columns, in place of one of its rows with all columns.
        flops = 2 * size * (2 * pairs * passages - math.ceil(pairs / ranks) * len(batch.passage_query))
        return flops < bytes_saved * FLOPS_PER_BYTE[device.current().type, self.products]


def _leading(vectors: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The first `size` dimensions at unit length, [N, size], and their lengths before, [N, 1]."""
    if size == vectors.size(1):
        return vectors, vectors.new_ones(len(vectors), 1)
    part = vectors[:, :size]
    norms = part.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return part / norms, norms


def _through_norm(grad: Tensor, unit: Tensor, norms: Tensor) -> Tensor:
    """The gradient to `x` from that to `unit = x / |x|`; all [N, d], norms [N, 1]."""
    return (grad - (grad * unit).sum(1, keepdim=True) * unit) / norms
