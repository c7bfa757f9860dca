"""The modelling file that travels with exports: its folded head, the path of flash attention, what it refuses."""

import copy

import pytest
import torch
from torch import nn

from nvembed_mcore.checkpoint.hf_files.modeling_nvembed import PoolingHead
from nvembed_mcore.checkpoint.hf_load import load_exported
from tests.helpers.exports import INSTRUCTION, KINDS, LIMIT, PROMPT, TEXTS, Case, sentence_transformer
from tools.compat.probe import FLASH, flash_stand_in

# The folded head


@pytest.fixture
def model(cases):
    return load_exported(cases["latent"].folder)


def embed(model):
    return model.encode(TEXTS, instruction=PROMPT, max_length=LIMIT)


def unfolded(monkeypatch):
    monkeypatch.setattr(PoolingHead, "_can_fold", lambda self: False)


@pytest.fixture
def folds(monkeypatch):
    """The data type of every fold that is made."""
    made, fold = [], PoolingHead._fold

    def counted(self, dtype):
        made.append(dtype)
        return fold(self, dtype)

    monkeypatch.setattr(PoolingHead, "_fold", counted)
    return made


def gradients(model):
    ids = torch.randint(3, 32000, (3, 9), generator=torch.Generator().manual_seed(0))
    output = model(ids, pool_mask=torch.ones_like(ids)).sentence_embeddings
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return dict(
        zip(
            [name for name, _ in model.named_parameters()],
            torch.autograd.grad((output * upstream).sum(), list(model.parameters())),
            strict=True,
        )
    )


def test_folded_is_the_plain_order_forward_and_backward(model, monkeypatch):
    folded, folded_gradients = embed(model), gradients(model)
    unfolded(monkeypatch)
    assert (embed(model) - folded).abs().max() < 1e-6
    for name, plain in gradients(model).items():
        assert (folded_gradients[name] - plain).abs().max() <= 1e-4 * max(plain.abs().max().item(), 1e-3), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_folded_is_as_exact_as_the_plain_order_in_half_precision(model, monkeypatch, dtype):
    halved = copy.deepcopy(model).to(dtype)
    truth = embed(copy.deepcopy(halved).float())
    folded = embed(halved)
    unfolded(monkeypatch)
    error, plain = ((vectors - truth).norm(dim=1).mean() for vectors in (folded, embed(halved)))
    assert 0 < error <= 1.5 * plain


def test_it_is_folded_once_and_again_when_a_parameter_changes(model, folds):
    names = list(model.state_dict())
    before = embed(model)
    assert torch.equal(embed(model), before) and folds == [torch.float32]
    assert list(model.state_dict()) == names and copy.deepcopy(model).state_dict().keys() == set(names)
    attend = model.latent_attention_model.cross_attend_blocks[0]
    with torch.no_grad():
        for number, parameter in enumerate([attend.norm_context.bias, attend.fn.to_out.weight], 2):
            parameter.mul_(1.5).add_(0.1)
            changed = embed(model)
            assert len(folds) == number and (changed - before).abs().max() > 1e-3
            before = changed
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    assert torch.equal(embed(model), before) and len(folds) == 4
    embed(model.to(torch.bfloat16))
    assert folds[4:] == [torch.bfloat16]


def test_a_model_in_training_is_folded_in_each_forward(model, folds):
    ids = torch.tensor([[1, 500, 600, 2]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        loss = model(ids, pool_mask=torch.ones_like(ids)).sentence_embeddings[0, 0]
        optimizer.zero_grad()
        loss.backward()
        assert model.latent_attention_model.latents.grad.abs().max() > 0
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and len(folds) == 3
    with torch.no_grad():
        assert model(ids, pool_mask=torch.ones_like(ids))[0][0, 0] < losses[-1]


def test_what_was_folded_without_gradients_serves_with_them(model, folds):
    """Under inference_mode tensors are made that autograd refuses."""
    ids = torch.tensor([[1, 500, 600, 2]])
    model.latent_attention_model.requires_grad_(False)
    with torch.inference_mode():
        model(ids, pool_mask=torch.ones_like(ids))
    model(ids, pool_mask=torch.ones_like(ids))[0].sum().backward()
    assert folds == [torch.float32] and model.get_input_embeddings().weight.grad.abs().max() > 0


def test_a_wrapped_projection_is_not_folded_away(model):
    """An adapter around a projection counts: the head then goes through it."""

    class Doubled(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight = inner, inner.weight

        def forward(self, states):
            return 2 * self.inner(states)

    doubled = copy.deepcopy(model)
    fn = model.latent_attention_model.cross_attend_blocks[0].fn
    fn.to_q = Doubled(fn.to_q)
    with torch.no_grad():
        doubled.latent_attention_model.cross_attend_blocks[0].fn.to_q.weight.mul_(2)
    assert (embed(model) - embed(doubled)).abs().max() < 1e-6


@torch.no_grad()
def test_what_is_written_to_data_is_folded_anew(model, folds):
    before = embed(model)
    attend = model.latent_attention_model.cross_attend_blocks[0]
    for weight in (attend.fn.to_out.weight, attend.fn.to_q.weight, attend.norm_context.bias):
        version = weight._version
        weight.data.mul_(-3).add_(0.1)
        assert weight._version == version, "torch does not see it"
        changed = embed(model)
        assert torch.equal(embed(model), changed) and (changed - before).abs().max() > 1e-3
        before = changed
    assert len(folds) == 4


@pytest.mark.parametrize("is_used_wrapped", [True, False])
def test_adapters_on_the_head_count_when_merged(model, is_used_wrapped):
    """PEFT merges by writing to `.data` and puts the same linear back."""
    from peft import LoraConfig, get_peft_model

    before = embed(model)
    settings = LoraConfig(target_modules=["to_q", "to_kv", "to_out"], init_lora_weights=False, lora_alpha=64)
    wrapped = get_peft_model(model, settings)
    expected = embed(model if is_used_wrapped else copy.deepcopy(model))
    merged = wrapped.merge_and_unload()
    assert (expected - before).abs().max() > 0.1 and (embed(merged) - expected).abs().max() < 1e-5


# Flash attention, with torch's in place of the kernel


@pytest.mark.parametrize(
    ("kind", "causal"), [(kind, False) for kind in KINDS] + [("latent", True), ("multi_layer", True)]
)
def test_the_path_of_flash_attention(cases, tokenizer_dir, tmp_path, monkeypatch, kind, causal):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    calls = []

    def counted(module, *arguments, **settings):
        calls.append(module)
        return flash_stand_in(module, *arguments, **settings)

    case = Case(kind, tokenizer_dir, tmp_path, causal=True) if causal else cases[kind]
    model = load_exported(case.folder)
    assert model._supports_flash_attn and model._supports_flash_attn_2
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, FLASH, counted)
    model.embedding_model.config._attn_implementation = FLASH
    for prompt, instruction in (("", ""), (PROMPT, INSTRUCTION)):
        embeddings = model.encode(TEXTS, instruction=prompt, max_length=LIMIT, batch_size=3)
        assert (embeddings - case.expected(TEXTS, instruction)).abs().max() < 1e-5
    assert len(calls) == 2 * 3 * 2  # ways, batches, layers


# Nothing to pool


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_without_a_pooled_position_is_an_error(cases, kind):
    model, ids = load_exported(cases[kind].folder), torch.tensor([[1, 500, 600, 2]] * 3)
    pool_mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    with pytest.raises(ValueError, match=r"rows \[1\] have nothing to pool"):
        model(ids, torch.ones_like(ids), pool_mask)
    with pytest.raises(ValueError, match=r"rows \[0\] have nothing to pool: is the instruction longer than"):
        sentence_transformer(cases[kind].folder).encode(["a text"], prompt="Instruct: " + "word " * 99 + "\nQuery: ")
