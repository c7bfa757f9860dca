"""What context-parallel processes are asked, besides the steps of the grid."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch

from nvembed_mcore.data.packing import WHOLE, Split, make_pack
from tests.helpers import cases, models, te_context
from tests.helpers.cases import Case, layout
from tests.helpers.states import encoder_states, own_tokens

PACKS = [[1], [40], [7, 1, 16, 3, 33, 2, 64], [1, 1, 1, 5], np.random.default_rng(0).integers(1, 50, 20).tolist()]
HEADS, GROUPS, WIDTH = 6, 2, 8


def attention_differences(cp: int) -> dict[str, float]:
    """Largest difference of attention over texts that ranks share from attention over whole ones: the states, and the
    gradients of queries, keys and values, in float64."""
    from nvembed_mcore.model import attention

    _, groups = layout(1, 1, False, cp=cp)
    packed, found = attention.attend_packed, {}
    for causal in (False, True):
        mask = "causal" if causal else "bidirectional"
        found[f"padded, {mask}"] = max(_attention_difference(lengths, causal, groups) for lengths in PACKS)
        # The form that a CPU would not choose.
        with mock.patch.object(attention, "attend_padded", lambda *qkv, dropout, **how: packed(*qkv, **how)):
            found[f"packed, {mask}"] = max(_attention_difference(lengths, causal, groups) for lengths in PACKS)
    return found


def _attention_difference(lengths: list[int], causal: bool, groups) -> float:
    from nvembed_mcore.model.attention import packed_attention, packing_of

    split, cpu = Split(groups.cp_rank, groups.cp_size), torch.device("cpu")
    texts = models.random_texts(lengths, 250)
    rows, numbers = own_tokens(make_pack(texts, split=split))
    torch.manual_seed(len(lengths))
    whole = [torch.randn(sum(lengths), heads, WIDTH, dtype=torch.float64) for heads in (HEADS, GROUPS, GROUPS, HEADS)]
    size = len(make_pack(texts, split=split).token_ids)
    # What fills a sequence must not matter, whatever it holds.
    parts = [torch.full((size, *states.shape[1:]), 1e3, dtype=torch.float64) for states in whole]
    for part, states in zip(parts, whole, strict=True):
        part[rows] = states[numbers]
    parts[3] = torch.zeros_like(parts[3]).index_copy(0, torch.as_tensor(rows), whole[3][numbers])

    def results(states, packing):
        *inputs, upstream = [one.clone().requires_grad_() for one in states]
        out = packed_attention(*inputs, packing, causal=causal)
        return [out, *torch.autograd.grad(out, inputs, upstream)]

    truth = results(whole, packing_of(np.array(lengths), cpu, WHOLE))
    found = results(parts, packing_of(np.array(lengths), cpu, split, groups.cp))
    is_filler = np.setdiff1d(np.arange(size), rows)
    assert all(one.isfinite().all() for one in found) and not any(one[is_filler].any() for one in found[2:])
    differences = [(one[rows] - other[numbers]).abs() for one, other in zip(found, truth, strict=True)]
    return torch.cat([one.flatten() for one in [torch.zeros(1), *differences]]).max().item()


def groups_of_ranks(tp: int, cp: int) -> dict[str, list[int]]:
    """The ranks of this rank's groups."""
    _, groups = layout(tp, 1, False, cp=cp)
    return groups.members() | {"place": [groups.tp_rank, groups.cp_rank, groups.dp_rank]}


def step_without_the_factor(case: Case) -> dict[str, float]:
    """`training_steps` where the sum over a text's tokens hands its gradient on as it is."""
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region

    from nvembed_mcore.model import encoder

    def identity(values, groups):
        return reduce_from_tensor_model_parallel_region(values, groups.cp)

    with mock.patch.object(encoder, "sum_over_context", identity):
        return cases.training_steps(case)


def graph_of_a_long_text(case: Case, length: int) -> int:
    """Bytes that this rank's part of the graph of one text keeps."""
    from nvembed_mcore.memory import graph_bytes

    step, groups, *_ = cases.build_step(case)
    (chunk,) = step.chunks
    pack = make_pack(models.random_texts([length], 250), split=Split(groups.cp_rank, groups.cp_size))
    return graph_bytes(lambda: chunk(pack), list(chunk.module.parameters()))


def dropped_attention(case: Case) -> list[float]:
    """Attention weights that were drawn for this rank's first tokens, as the step's seeds draw them."""
    from nvembed_mcore.step import microbatch_seed

    _, groups, *_ = cases.build_step(case)
    torch.manual_seed(microbatch_seed(0, 1, 0, 0, groups))
    return torch.rand(4).tolist()


def encoder_states_by_transformer_engine(mask: str, cp: int) -> tuple[dict[str, float], int]:
    """As `states.encoder_states`, with a stand-in for its attention; and how often that was called."""
    from nvembed_mcore.model import mistral, te_attention

    with pytest.MonkeyPatch.context() as patch:
        te_context.install(patch)
        patch.setattr(mistral, "PackedCoreAttention", te_attention.TransformerEngineCoreAttention)
        patch.setattr(te_attention, "why_torch", lambda config: "")  # of float32, which the stand-in computes
        return encoder_states(1, 1, False, mask, cp=cp), te_context.DotProductAttention.calls
