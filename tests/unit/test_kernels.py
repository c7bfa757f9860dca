"""The Triton kernel of InfoNCE against its reference in float64, by Triton's interpreter; and that it compiles.

Triton reads TRITON_INTERPRET when it is imported, which any test of this process may have done before. So child
processes run the kernel: one interprets it in all cases, one compiles it for GPUs that need not be there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nvembed_mcore.kernels import reference
from nvembed_mcore.kernels.reference import Columns, Masks, Rows, Softmax

ROOT = Path(__file__).parents[2]
EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True, kw_only=True)
class Case:
    """A block and its masks.

    Attributes:
        most: columns that the kernel holds at a time.
        masked: share of rows that are compared at all.
        part: columns of the block; the softmax is known, over all `columns`. None: all, and it is not.
        gap: floats between a row's end and the next row.
        apart: the gradient goes into memory of its own, as float16 (the interpreter cuts bfloat16 off).
    """

    rows: int = 9
    columns: int = 70
    masks: Masks = Masks(same_document=False)
    in_batch: float = 1.0
    shared: float = 1.0
    hard: float = 0.6
    masked: float = 1.0
    scale: float = 20.0
    most: int = 16
    part: slice | None = None
    gap: int = 0
    apart: bool = False


ALL_ON = Case(
    masks=Masks(same_document=True, same_dataset_only=True, margin=2.0), in_batch=0.7, shared=0.8, masked=0.7
)
CASES = {
    "only_own_positives": Case(),
    "no_own_positives": Case(hard=1.0),
    "same_document": Case(masks=Masks(same_document=True)),
    "same_dataset": Case(masks=Masks(same_document=False, same_dataset_only=True)),
    "margin": Case(masks=Masks(same_document=False, margin=1.0)),
    "negative_margin": Case(masks=Masks(same_document=False, margin=-1.0)),
    "own_hard_negatives_only": Case(in_batch=0.0),
    "positive_only": Case(in_batch=0.0, hard=0.0),
    "some_in_batch": Case(in_batch=0.5),
    "some_shared": Case(shared=0.5),
    "none_shared": Case(shared=0.0),
    "no_row_is_masked": Case(masked=0.0),
    "some_rows_are_masked": Case(masked=0.5, in_batch=0.5),
    "all_masks": ALL_ON,
    "one_block": replace(ALL_ON, most=4096),
    "blocks_of_one_column": replace(ALL_ON, most=1, rows=3, columns=12),
    "whole_blocks": replace(ALL_ON, columns=64),
    "one_column_more_than_blocks": replace(ALL_ON, columns=65),
    "rows_apart": replace(ALL_ON, gap=7),
    "large_scores": replace(ALL_ON, scale=1000.0),
    "one_row": replace(ALL_ON, rows=1),
    "one_column": replace(ALL_ON, rows=2, columns=1),
    "no_rows": replace(ALL_ON, rows=0),
    "known_of_all_columns": replace(ALL_ON, part=slice(0, 70)),
    "known_of_some_columns": replace(ALL_ON, part=slice(21, 54)),
    "known_without_masks": Case(part=slice(21, 54), masked=0.0),
    "known_without_positives": replace(ALL_ON, rows=4, part=slice(66, 70)),
    "gradient_apart": replace(ALL_ON, gap=7, apart=True),
    "known_and_gradient_apart": replace(ALL_ON, part=slice(21, 54), apart=True),
    "known_and_no_rows": replace(ALL_ON, rows=0, part=slice(21, 54)),
}


def make_block(case: Case) -> tuple[Tensor, Rows, Columns]:
    """Float32 scores of all columns, and targets: two columns a query in the mean, few documents and data sets."""
    random = np.random.default_rng(0)

    def integers(most: int, *shape: int) -> Tensor:
        return torch.as_tensor(random.integers(0, most, shape).astype(np.int32))

    def chances(share: float, count: int) -> Tensor:
        return torch.as_tensor(random.random(count) < share)

    num_queries = max(1, case.columns // 2)
    # Positives stay below the last columns, so that a part can be without any.
    positive = torch.as_tensor(random.integers(0, max(1, case.columns - 4), case.rows))
    columns = Columns(
        query=integers(num_queries, case.columns),
        hard=chances(case.hard, case.columns),
        shared=chances(case.shared, case.columns),
        dataset=integers(2, case.columns),
        documents=integers(25, case.columns, 2),
    )
    rows = Rows(
        query=columns.query[positive],
        positive=positive,
        weight=torch.ones(case.rows),
        in_batch=chances(case.in_batch, case.rows),
        dataset=columns.dataset[positive],
        documents=torch.cat([columns.documents[positive], integers(25, case.rows, 1)], dim=1),
        is_masked=chances(case.masked, case.rows),
    )
    scores = np.tanh(random.standard_normal((case.rows, case.columns))) * case.scale
    return torch.as_tensor(scores.astype(np.float32)), rows, columns


def part_of(block: slice, rows: Rows, columns: Columns) -> tuple[Rows, Columns]:
    """Rows and columns where only a part of the columns is at hand."""
    place = rows.positive - block.start
    is_here = (place >= 0) & (rows.positive < block.stop)
    columns = Columns(**{name: values[block] for name, values in vars(columns).items()})
    return replace(rows, positive=place.where(is_here, -1)), columns


def run(case: Case, function, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a version of the block's function makes of a case: the gradient, and the softmax or what it is part of."""
    scores, rows, columns = make_block(case)
    known = None
    if case.part is not None:
        known, _ = reference.softmax_gradient_(scores.double(), rows, columns, case.masks)
        # As they come out of a gather of two numbers a row: not contiguous.
        known = Softmax(*torch.stack([known.log_sum, known.of_positive], dim=1).to(dtype).unbind(1))
        scores = scores[:, case.part]
        rows, columns = part_of(case.part, rows, columns)
    wide = torch.full((len(scores), scores.size(1) + case.gap), 5.0, dtype=dtype)
    block = wide[:, : scores.size(1)].copy_(scores)
    gradient = None
    if case.apart:
        memory = torch.full_like(wide, 5.0, dtype=torch.float64 if dtype == torch.float64 else torch.float16)
        gradient = memory[:, : scores.size(1)]
    found, best = function(block, rows, columns, case.masks, known, gradient=gradient)
    assert torch.all(wide[:, scores.size(1) :] == 5.0), "written beyond the block"
    if gradient is not None:
        assert torch.all(memory[:, scores.size(1) :] == 5.0), "written beyond the gradient"
    result = {
        "gradient": (block if gradient is None else gradient).clone(),
        "log_sum": found.log_sum,
        "of_positive": found.of_positive,
    }
    return result if best is None else result | {"best": best}


def interpret_all(path: str) -> None:
    """Run by the child: the kernel's results of all cases, into a file."""
    from nvembed_mcore.kernels import info_nce

    results = {}
    for name, case in CASES.items():
        info_nce.MOST_COLUMNS = case.most
        results[name] = run(case, info_nce.softmax_gradient_, torch.float32)
    torch.save(results, path)


POINTERS = {
    "i1": ("row_in_batch", "row_is_masked", "column_hard", "column_shared"),
    "i64": ("row_positive",),
    "fp32": ("scores", "log_sum_out", "of_positive_out", "best_out"),
}
NUMBERS = {"stride": "i32", "gradient_stride": "i32", "num_columns": "i32", "margin": "fp32"}


def compile_all() -> None:
    """Run by the child: machine code of the kernel, for two generations of GPUs and both of its forms."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from nvembed_mcore.kernels import info_nce

    kernel = info_nce._softmax_gradient
    types = NUMBERS | {name: f"*{kind}" for kind, names in POINTERS.items() for name in names}
    for capability, is_known, has_masks in ((80, False, True), (90, True, True), (90, False, False)):
        constants = dict(ROW_DOCUMENTS=2, COLUMN_DOCUMENTS=1, IS_KNOWN=is_known, BLOCK=info_nce.MOST_COLUMNS)
        constants |= dict(SAME_DOCUMENT=has_masks, SAME_DATASET=has_masks, HAS_MARGIN=has_masks)
        types["gradient"] = "*bf16" if is_known else "*fp32"
        signature = {name: "constexpr" if name in constants else types.get(name, "*i32") for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, constexprs=places)
        target, options = GPUTarget("cuda", capability, 32), {"num_warps": info_nce.NUM_WARPS}
        compiled = triton.compile(source, target=target, options=options)
        assert len(compiled.asm["cubin"]) > 0


def in_child(
    call: str, *arguments: str, module: str = "test_kernels", **environment: str
) -> subprocess.CompletedProcess:
    """Call a function of a module of tests/unit in a process of its own."""
    program = f"import sys; from tests.unit import {module}; {module}.{call}(*sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory) -> dict[str, dict[str, Tensor]]:
    """The kernel's results of each case."""
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("kernels") / "results.pt"
    child = in_child("interpret_all", str(path), TRITON_INTERPRET="1")
    assert child.returncode == 0, child.stderr
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_as_exact_as_its_reference(name, interpreted):
    truth = run(CASES[name], reference.softmax_gradient_, torch.float64)
    plain = run(CASES[name], reference.softmax_gradient_, torch.float32)
    found = interpreted[name]
    assert found.keys() == truth.keys()
    for what, values in truth.items():
        assert found[what].dtype == plain[what].dtype and found[what].shape == values.shape
        if values.numel():
            error, of_plain = ((other[what] - values).abs().max().item() for other in (found, plain))
            assert error <= 2 * of_plain + EPSILON * max(1.0, values.abs().max().item()), what


@pytest.mark.parametrize(
    "name", ["same_document", "same_dataset", "margin", "negative_margin", "some_in_batch", "some_shared"]
)
def test_each_mask_takes_columns_away(name):
    """Otherwise the cases above would prove nothing of it."""
    case = CASES[name]
    scores, rows, columns = make_block(case)
    of_positive = scores.gather(1, rows.positive[:, None])[:, 0]
    plain = replace(rows, in_batch=torch.ones_like(rows.in_batch))
    every = replace(columns, shared=torch.ones_like(columns.shared))
    unmasked = reference.allowed(scores, of_positive, plain, every, Masks(same_document=False))
    allowed = reference.allowed(scores, of_positive, rows, columns, case.masks)
    assert not (allowed & ~unmasked).any()
    is_own = columns.query[None] == rows.query[:, None]
    taken = unmasked & ~allowed
    assert (taken & ~is_own).any()
    assert (taken & is_own).any() == (name == "same_document"), "only documents reach a row's own columns"


def test_the_kernel_compiles_for_gpus_that_are_not_here(tmp_path):
    backends = pytest.importorskip("triton.backends").backends
    if "nvidia" not in backends:
        pytest.skip("this Triton has no NVIDIA compiler")
    child = in_child("compile_all", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert child.returncode == 0, child.stderr
