"""What runs where TransformerEngine is: in a process with its stand-in (`stand_in_te`), some of it on a GPU, too."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from unittest import mock

import torch

from nvembed_mcore.config import ConfigError, LoraConfig, ModelConfig, PoolingConfig, PrecisionConfig
from nvembed_mcore.data.packing import make_pack
from nvembed_mcore.metrics import PhaseTimer
from nvembed_mcore.model import te_layers
from nvembed_mcore.schedule import embed_texts
from tests.helpers import cases, models, transfer
from tests.helpers.cases import Case
from tests.helpers.plain import lora_config, training_batch
from tests.helpers.stand_in_te import Log

ALL = ("q", "k", "v", "o", "gate", "up", "down")
MARKS = ("tensor_model_parallel", "partition_dim", "sequence_parallel")


def encoder_of(backend: str, fp8: str = "off", targets: tuple[str, ...] = (), hf_config=None):
    """An encoder with weights from a fixed seed, by name."""
    from nvembed_mcore.model.encoder import Encoder

    parallel, groups = cases.layout(1, 1, False)
    lora = lora_config(targets) or LoraConfig()
    model = ModelConfig(config="unused", backend=backend, pooling=PoolingConfig(kind="mean"), lora=lora)
    hf_config = hf_config or models.tiny_config(num_hidden_layers=2)
    encoder = Encoder(hf_config, model, parallel, groups, precision=PrecisionConfig(dtype="float32", fp8=fp8))
    fill(encoder, seed=0)
    return encoder


def fill(encoder, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(encoder.parameters_by_global_name().items()):
            parameter.normal_(0.0, 0.2)


def some_pack(multiple: int = 16):
    return make_pack(models.random_texts([7, 16, 3, 12], 250), multiple)


def described(backend: str, targets: tuple[str, ...]) -> tuple[dict, dict]:
    """Parameters with their shapes, types and marks; and what a checkpoint stores of each."""
    from nvembed_mcore.checkpoint import store

    encoder = encoder_of(backend, targets=targets)
    parameters = {
        name: (tuple(p.shape), p.dtype, p.requires_grad, *(getattr(p, mark, False) for mark in MARKS))
        for name, p in encoder.parameters_by_global_name().items()
    }
    stored = {name: (one.key, type(one).__name__) for name, one in store.weights_of(encoder).items()}
    return parameters, stored


def names_and_marks() -> list[tuple[dict, dict]]:
    return [described(backend, targets) for targets in ((), ALL) for backend in ("local", "transformer_engine")]


def exchanged_weights(folder: Path) -> list[float]:
    """Largest difference of embeddings between the backend that wrote a checkpoint and the other, which loaded it."""
    from nvembed_mcore.checkpoint import store
    from nvembed_mcore.model import backend

    hf_config = models.tiny_config(num_hidden_layers=2)
    pooling = PoolingConfig(kind="mean")
    transfer.write_folder(folder / "hf", hf_config, pooling, torch.float32)
    found = []
    for writer, reader in (("local", "transformer_engine"), ("transformer_engine", "local")):
        here = "" if writer == "transformer_engine" else "it is not wanted"
        with mock.patch.object(backend, "why_no_transformer_engine", lambda here=here: here):
            transfer.import_and_save(folder / "hf", folder / writer, pooling, "float32", 1, 1)
        loaded, filled = (encoder_of(name, hf_config=hf_config) for name in (reader, writer))
        for encoder in (loaded, filled):
            store.load_weights(store.find_checkpoint(folder / writer), [encoder])
        with torch.no_grad():
            found.append((loaded(some_pack()) - filled(some_pack())).abs().max().item())
    return found


def many_training_steps(many: list[Case]) -> list[dict[str, float]]:
    return cases.many_training_steps(many)


def recipes() -> dict[str, list[tuple[str, dict]]]:
    """By `precision.fp8`: what each FP8 region of a forward was given."""
    found = {}
    for fp8 in ("off", "delayed", "tensorwise", "blockwise"):
        Log.clear()
        encoder_of("transformer_engine", fp8)(some_pack())
        found[fp8] = [(type(recipe).__name__, recipe.settings) for recipe in Log.recipes]
    return found


def refusals() -> list[str]:
    """What is said to a recipe that the device has not, and to a model whose sizes FP8 does not take."""
    said = []
    for fp8, changes in (("mxfp8", {}), ("tensorwise", {"intermediate_size": 72})):
        try:
            encoder_of("transformer_engine", fp8, hf_config=models.tiny_config(**changes))
        except ConfigError as error:
            said.append(str(error))
    return said


def quantized_weights(case: Case) -> list[int]:
    """How often a weight was rounded in each of three steps."""
    step, *_ = cases.build_step(case)
    counts = []
    for number in (1, 2, 3):
        Log.clear()
        step(training_batch(case.queries, number), number, PhaseTimer())
        counts.append(Log.quantized)
    return counts


def stale_weights(case: Case, **changes) -> dict[str, float]:
    """How far embeddings by kept weights are from those by weights that are rounded anew: after a step and a load.

    `moved`: how far the step and the load moved the embeddings, which must not be nothing.
    """
    step, *_ = cases.build_step(case, **changes)
    (chunk,) = step.chunks
    encoder, pack, found = chunk.module, some_pack(), {}

    def change() -> float:
        """Of embeddings, when nothing is kept."""
        before = encoder(pack)
        for linear in te_layers.linears_of(encoder):
            linear._fp8_workspaces.clear()
        return (encoder(pack) - before).abs().max().item()

    with torch.no_grad():
        first = encoder(pack)
        with torch.enable_grad():
            step(training_batch(case.queries, 1), 1, PhaseTimer())
        found["step"] = change()
        second = encoder(pack)
        grown = {name: value * 1.5 for name, value in encoder.named_parameters() if value.dim() == 2}
        encoder.load_state_dict(grown, strict=False)
        found["load"] = change()
        moved = [(second - first).abs().max().item(), (encoder(pack) - second).abs().max().item()]
    return found | {"moved": min(moved)}


def gradients(case: Case, told: list[bool | None], **changes) -> list[float]:
    """The largest relative difference of a step's gradient where linears are told so of each microbatch.

    `told`: None: weights are not kept at all. True: this forward is the step's first, as Megatron's schedule says.
    """
    results = []
    for is_first in [False, *told]:
        answers = {True: lambda linear: not linear._fp8_workspaces}.get(is_first, lambda _, answer=is_first: answer)
        rule = property(answers, lambda linear, value: None)
        with mock.patch.object(te_layers._KeepsFp8Weight, "is_first_microbatch", rule):
            step, _, _, parameters = cases.build_step(
                dataclasses.replace(case, distributed=False, clip=0.0), **changes
            )
            step(training_batch(case.queries, 1), 1, PhaseTimer())
        results.append({name: p.main_grad.clone() for name, p in parameters.items() if p.requires_grad})
    ours, *others = results
    return [max(_difference(other[name], ours[name]) for name in ours) for other in others]


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()


def histories(case: Case, **changes) -> dict[str, list]:
    """What delayed scaling remembers of one linear's inputs and gradients after each of two steps, with an
    evaluation between them, and what the linear really saw."""
    step, *_ = cases.build_step(case, **changes)
    linear = next(te_layers.linears_of(step.chunks[0].module))
    seen, found = [], {"seen": [], "forward": [], "backward": [], "evaluation": []}
    linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().abs().max().item()))
    for number in (1, 2):
        seen.clear()
        step(training_batch(case.queries, number), number, PhaseTimer())
        found["seen"].append(max(seen))
        states = [linear.fp8_meta[which] for which in ("scaling_fwd", "scaling_bwd")]
        for name, history in zip(("forward", "backward"), states, strict=True):
            found[name].append([value for value in history.amax_history[:, 0].tolist() if value])
        embed_texts(step.chunks, step.groups, models.random_texts([5, 9], 250), 100)
        found["evaluation"].append(states[0].amax_history[0, 0].item())
    return found | {"scales": [state.scale.tolist() for state in states]}


def histories_in_checkpoints(case: Case) -> tuple[bool, int, list[float]]:
    """Whether histories of a run that took a step are, by name, those that another begins with which loaded them; how
    many tensors they are; and how far the embeddings of both are apart, and those of a run that did not load."""
    from nvembed_mcore.checkpoint import fp8_state

    (trained,), (resumed,), (fresh,) = (cases.build_step(case)[0].chunks for _ in range(3))
    saved = {name: torch.rand_like(one) * 100 for name, one in fp8_state.histories_of(trained.module).items()}
    fp8_state.load(trained, saved)
    fp8_state.load(resumed, fp8_state.histories_of(trained.module))
    with torch.no_grad():
        ours, theirs, others = (chunk.module(some_pack()) for chunk in (trained, resumed, fresh))
    found = fp8_state.histories_of(resumed.module)
    is_same = all(torch.equal(found[name][1:], saved[name][1:]) for name in saved if name.endswith("amax_history"))
    apart = [(other - ours).abs().max().item() for other in (theirs, others)]
    return is_same and found.keys() == saved.keys(), len(found), apart
