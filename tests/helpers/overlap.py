"""Steps whose communication overlaps with computation, for the processes of a `World`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nvembed_mcore.config import CheckpointConfig
from tests.helpers import models
from tests.helpers.cases import Case, build_step
from tests.helpers.plain import training_batch
from tests.helpers.resumed import digest


def both_ways(case: Case, folder: Path, deaf: bool = False) -> dict[str, tuple]:
    """`trace` with weights gathered at the end of a step, and while the next one runs."""
    plain = trace(dataclasses.replace(case, gather=False), folder / "plain")
    overlapped = trace(dataclasses.replace(case, gather=True), folder / "overlapped", deaf=deaf)
    return {name: (plain[name], overlapped[name]) for name in plain}


def trace(case: Case, folder: Path, deaf: bool = False) -> dict[str, object]:
    """Three steps, a save after the second and an evaluation after the third: everything by its bits.

    `deaf` spoils the run on purpose: no module waits for the parameters of its parts.
    """
    from nvembed_mcore.checkpoint.saver import Saver
    from nvembed_mcore.metrics import PhaseTimer
    from nvembed_mcore.parallel.param_gather import finish_param_gather
    from nvembed_mcore.schedule import embed_texts

    step, groups, *_ = build_step(case)
    if deaf:
        _deafen(step.chunks)
    found = {"losses": [], "norms": [], "gradients": []}
    for number in (1, 2, 3):
        output = step(training_batch(case.queries, number), number, PhaseTimer())
        found["losses"].append(output.loss)
        found["norms"].append(output.grad_norm)
        found["gradients"].append([digest(buffer.grad_data) for chunk in step.chunks for buffer in chunk.buffers])
        if number == 2:
            saver = Saver(CheckpointConfig(), folder, groups)
            saver.prepare(step.chunks, None)
            saver.save(number, step.chunks, step.optimizer, {})
    embeddings = embed_texts(step.chunks, groups, models.random_texts([5, 9, 3, 14], 250), case.budget)
    found["evaluation"] = None if embeddings is None else digest(embeddings)
    finish_param_gather(step.chunks)
    found["parameters"] = [digest(p) for chunk in step.chunks for p in chunk.module.parameters()]
    return found


def _deafen(chunks: list) -> None:
    for module in [module for chunk in chunks for module in chunk.module.modules()]:
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook.__qualname__.startswith("wait_for_parts")]:
            del hooks[key]


def order_of_reduction(case: Case) -> list[tuple[list[str], int]]:
    """Buckets in the order in which the second step's backward passes send them: the names of their parameters, and
    how many parameters outside of the head had their gradients by then. What is sent behind them is left out.
    """
    from nvembed_mcore import step as room
    from nvembed_mcore.metrics import PhaseTimer

    step, *_ = build_step(case)
    (chunk,) = step.chunks
    name_of = {parameter: name for name, parameter in chunk.module.named_parameters()}
    step(training_batch(case.queries, 1), 1, PhaseTimer())  # Megatron counts first, and sends all at the end
    sent = []

    def record(group, send):
        def recording(*args, **kwargs):
            ready = {name_of[p] for one in chunk.bucket_groups for p in one.per_param_grad_ready_counts}
            sent.append(([name_of[p] for p in group.params], sum(not name.startswith("pooling.") for name in ready)))
            return send(*args, **kwargs)

        return recording

    for group in chunk.bucket_groups:
        group.start_grad_sync = record(group, group.start_grad_sync)
    finalize, in_backward = room.finalize_model_grads, []
    room.finalize_model_grads = lambda chunks: (in_backward.extend(sent), finalize(chunks))
    try:
        step(training_batch(case.queries, 1), 2, PhaseTimer())
    finally:
        room.finalize_model_grads = finalize
    return in_backward
