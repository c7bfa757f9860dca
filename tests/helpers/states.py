"""Hidden states of the encoder, token by token, against Hugging Face's."""

from __future__ import annotations

import numpy as np
import torch

from nvembed_mcore.data.packing import Pack, Split, make_pack
from tests.helpers import models
from tests.helpers.cases import build, layout, worst_difference


def own_tokens(pack: Pack) -> tuple[np.ndarray, np.ndarray]:
    """Rows of this context-parallel rank's states that are tokens of texts, and the numbers of these tokens."""
    filled = pack.split.filled(pack.lengths)
    sequence = np.repeat(np.arange(len(filled)), filled)
    position = np.arange(filled.sum()) - np.repeat(np.cumsum(filled) - filled, filled)
    is_token = (position < pack.lengths[sequence]) & (sequence < pack.num_texts)
    number = np.where(is_token, np.cumsum(is_token) - 1, -1)[pack.split.places(filled)]
    rows = np.flatnonzero(number >= 0)
    return rows, number[rows]


def encoder_states(
    tp: int,
    pp: int,
    sp: bool,
    mask: str = "bidirectional",
    lengths=(7, 16, 3, 12, 2, 24),
    chunks_per_stage: int = 1,
    cp: int = 1,
):
    """Largest difference of hidden states from HF over the largest state, and that of the gradients."""
    from nvembed_mcore.schedule import pack_multiple, run_schedule

    parallel, groups = layout(tp, pp, sp, chunks_per_stage=chunks_per_stage, cp=cp)
    hf_config = models.tiny_config()
    reference = models.hf_reference(hf_config, is_causal=mask == "causal")
    texts = models.random_texts(list(lengths), hf_config.vocab_size)
    chunks, table, parameters = build(hf_config, reference, {}, "mean", parallel, groups, mask)
    packs = [make_pack(some, pack_multiple(chunks), Split(groups.cp_rank, cp)) for some in (texts[:4], texts[4:])]
    total = sum(lengths)
    upstream = torch.randn(total, hf_config.hidden_size, generator=torch.Generator().manual_seed(5))
    # Of all tokens, those of each pack that this rank has.
    own = [own_tokens(packs[0])[1], own_tokens(packs[1])[1] + packs[0].real_tokens]
    states_found = {}

    # The head is taken off, so that what comes out of the last stage is every token's state.
    def states_of(states, pack, packing):
        if chunks[0].config.sequence_parallel:
            from megatron.core import tensor_parallel

            states = tensor_parallel.gather_from_sequence_parallel_region(states, tensor_parallel_output_grad=False)
        return states[own_tokens(pack)[0]]

    chunks[-1].module._pool = states_of

    def surrogate(index, states):
        states_found[index] = states.detach()
        return (states * upstream[own[index]]).sum() * len(packs)

    for chunk in chunks:
        chunk.zero_grad_buffer()
    run_schedule(chunks, packs, surrogate, forward_only=False)
    expected = torch.cat([models.reference_states(reference, text) for text in texts])
    (expected * upstream).sum().backward()
    grads = {f"embedding_model.{name}": p.grad for name, p in reference.named_parameters()}
    found = {name: parameter.main_grad for name, parameter in parameters.items()}
    result = {"gradient": worst_difference(found, grads, table, groups)}
    if groups.is_last_stage:
        difference = torch.cat([states_found[0], states_found[1]]) - expected[np.concatenate(own)]
        result["states"] = (difference.abs().max() / expected.abs().max()).item()
    return result
