"""A plan as tables for a screen, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from nvembed_mcore.scaling.explain import explain
from nvembed_mcore.scaling.hardware import Cluster
from nvembed_mcore.scaling.layout import Layout
from nvembed_mcore.scaling.plan import Plan
from nvembed_mcore.scaling.predict import Prediction
from nvembed_mcore.scaling.traffic import traffic_of
from nvembed_mcore.scaling.workload import Workload

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Stage:
    """A configuration, and a plan for each number of GPUs."""

    file: str
    workload: Workload
    plans: list[Plan]


def _grid(columns: Sequence[str], title: str | None = None, words: Sequence[str] = ()) -> Table:
    """A table without frames, numbers to the right, those columns that hold `words` to the left."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for name in columns:
        is_words = name in words
        table.add_column(name, justify="left" if is_words else "right", no_wrap=not is_words, overflow="fold")
    return table


def layouts(plan: Plan, workload: Workload, price: float | None, top: int) -> Table:
    """The fastest layouts that fit, and the configuration's own."""
    table = _grid(
        [
            *("TP", "PP", "CP", "DP", "stages", "way", "budget", "s/step", "low-high", "tok/s\n/GPU", "MFU %", "GB"),
            *("GPU\nhours", *_money(price), ""),
        ],
        f"{plan.gpus} GPU{'s' * (plan.gpus > 1)}: {len(plan.fitting)} layouts fit, {len(plan.rejected)} do not",
        words=("stages", "way", ""),
    )
    rows = [(found, "") for found in plan.fitting[:top]]
    if not isinstance(plan.own, str):
        rows.append((plan.own, "as configured" if plan.own.fits else "as configured: does not fit"))
    for found, remark in rows:
        table.add_row(*_cells(found, workload, price), remark)
    return table


def _money(price: float | None) -> list[str]:
    return [] if price is None else ["$"]


def _cells(found: Prediction, workload: Workload, price: float | None) -> list[str]:
    layout, hours = found.layout, found.gpu_hours(workload.steps)
    return [
        *(str(size) for size in (layout.tp, layout.pp, layout.cp, layout.dp)),
        _stages(layout, workload.architecture.num_hidden_layers),
        layout.way,
        str(layout.tokens_per_microbatch),
        f"{found.total:.3f}",
        f"{found.low:.3f}-{found.high:.3f}",
        f"{found.tokens_per_second:,.0f}",
        f"{100 * found.mfu:.1f}",
        f"{sum(found.memory.values()) / 1e9:.1f}",
        _amount(hours),
        *([] if price is None else [_amount(hours * price)]),
    ]


def _amount(number: float) -> str:
    """GPU hours or dollars; of small ones two digits."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _stages(layout: Layout, layers: int) -> str:
    """Layers of the first, a middle and the last stage; `x 2` where each has two chunks."""
    each = [sum(chunks) for chunks in layout.stages(layers)]
    some = each if len(each) < 3 else [each[0], each[1], each[-1]]
    return "-".join(str(number) for number in some) + (f" x {layout.chunks}" if layout.chunks > 1 else "")


def refusals(plan: Plan, top: int) -> Iterator[str]:
    """Lines for the first `top` layouts that were rejected, and for the configuration's own where it cannot be."""
    if isinstance(plan.own, str):
        yield f"  as configured: {plan.own}"
    for one in plan.rejected[:top]:
        yield f"  rejected: {name_of(one.layout)}: {one.reason}"
    if len(plan.rejected) > top:
        yield f"  rejected: {len(plan.rejected) - top} more (--json has all)"


def name_of(layout: Layout) -> str:
    """A layout in a few words."""
    sizes = f"TP {layout.tp} PP {layout.pp}" + (f" CP {layout.cp}" if layout.cp > 1 else "")
    return f"{sizes} {layout.way} {layout.tokens_per_microbatch}"


def options_of(layout: Layout) -> str:
    """What makes `nvembed train` run this layout.

    For `single` it is `auto`, which takes it in the same steps: a batch of the run that needs a second pack would end
    a run that was told `single`.
    """
    fields = {
        "parallel.tp": layout.tp,
        "parallel.pp": layout.pp,
        "parallel.cp": layout.cp,
        "parallel.chunks_per_stage": layout.chunks,
        "step.way": "auto" if layout.way == "single" else layout.way,
        "step.tokens_per_microbatch": layout.tokens_per_microbatch,
        "parallel.overlap_grad_reduce": str(layout.overlap_grad_reduce).lower(),
        "parallel.overlap_param_gather": str(layout.overlap_param_gather).lower(),
    }
    if layout.layers_in_first_stage is not None:
        fields["parallel.layers_in_first_stage"] = layout.layers_in_first_stage
    if layout.layers_in_last_stage is not None:
        fields["parallel.layers_in_last_stage"] = layout.layers_in_last_stage
    return " ".join(f"--{name} {value}" for name, value in fields.items())


def terms(found: Prediction) -> Table:
    """Where each second of a layout's step goes."""
    title = f"{name_of(found.layout)}: where {1000 * found.total:.1f} ms go"
    table = _grid(["term", "ms a step", "share", "formula"], title, words=("term", "formula"))
    for line in explain(found):
        table.add_row(line.term, f"{1000 * line.seconds:.2f}", f"{100 * line.share:.1f} %", line.formula)
    return table


def memory(found: Prediction) -> Table:
    """What fills the fullest rank's memory."""
    limit = found.memory_limit
    table = _grid(["memory of the fullest rank", "GB", "of a GPU"], words=("memory of the fullest rank",))
    for kind, size in sorted(found.memory.items(), key=lambda item: -item[1]):
        table.add_row(kind.replace("_", " "), f"{size / 1e9:.2f}", f"{100 * size / limit:.1f} %")
    table.add_row("all", f"{sum(found.memory.values()) / 1e9:.2f}", f"of {limit / 1e9:.1f} GB")
    return table


def traffic(found: Prediction, workload: Workload, cluster: Cluster) -> Table:
    """What a rank of the last stage hands to collectives and sends in a step, and over which link that goes."""
    layout = found.layout
    inner = {"tensor": layout.tp, "context": layout.tp * layout.cp, "tensor and context": layout.tp * layout.cp}
    in_stage = layout.gpus // layout.pp
    table = _grid(["collective", "ranks", "MB a step", "link"], words=("collective", "ranks", "link"))
    for (kind, group), size in sorted(traffic_of(workload, layout).items(), key=lambda item: -item[1]):
        reach = inner.get(group, in_stage if group.startswith("data") else layout.gpus)
        link = cluster.intra_node if reach <= cluster.device.gpus_per_node else cluster.inter_node
        table.add_row(kind, group, f"{size / 1e6:,.2f}", link.name)
    return table


def sums(stages: list[Stage], price: float | None) -> Table:
    """All stages of a recipe, each in its fastest layout."""
    columns = ["GPUs", "hours", "GPU hours", "low-high", *_money(price)]
    table = _grid(columns, f"all {len(stages)} stages, each in its fastest layout")
    for plans in zip(*(stage.plans for stage in stages), strict=True):
        gpus = plans[0].gpus
        if not all(plan.fitting for plan in plans):
            table.add_row(str(gpus), "does not fit")
            continue
        fastest = [(plan.fitting[0], stage.workload.steps) for plan, stage in zip(plans, stages, strict=True)]
        hours = sum(found.gpu_hours(steps) for found, steps in fastest)
        low, high = (
            sum(found.gpu_hours(steps) * end(found) / found.total for found, steps in fastest)
            for end in (lambda one: one.low, lambda one: one.high)
        )
        money = [] if price is None else [_amount(hours * price)]
        table.add_row(str(gpus), f"{hours / gpus:,.1f}", _amount(hours), f"{_amount(low)}-{_amount(high)}", *money)
    return table


def as_json(stages: list[Stage], device: str, price: float | None) -> dict[str, Any]:
    """Everything, all layouts included; seconds, bytes, and dollars where there is a price."""
    return {
        "device": device,
        "price": price,
        "stages": [
            {
                "config": stage.file,
                "lengths": stage.workload.source,
                "tokens_per_step": stage.workload.tokens_per_step,
                "steps": stage.workload.steps,
                "plans": [_plan(plan, stage.workload.steps, price) for plan in stage.plans],
            }
            for stage in stages
        ],
    }


def _plan(plan: Plan, steps: int, price: float | None) -> dict[str, Any]:
    return {
        "gpus": plan.gpus,
        "layouts": [_prediction(found, steps, price) for found in plan.fitting],
        "as_configured": plan.own if isinstance(plan.own, str) else _prediction(plan.own, steps, price),
        "rejected": [{"layout": asdict(one.layout), "reason": one.reason} for one in plan.rejected],
    }


def _prediction(found: Prediction, steps: int, price: float | None) -> dict[str, Any]:
    hours = found.gpu_hours(steps)
    return {
        "layout": asdict(found.layout) | {"dp": found.layout.dp},
        "fits": found.fits,
        "seconds": found.total,
        "seconds_low": found.low,
        "seconds_high": found.high,
        "seconds_by_term": {line.term: line.seconds for line in explain(found)},
        "tokens_per_second_per_gpu": found.tokens_per_second,
        "mfu": found.mfu,
        "memory": found.memory,
        "gpu_hours": hours,
        "dollars": None if price is None else hours * price,
        "microbatches": found.balance.microbatches,
        "imbalance": found.balance.imbalance,
    }
