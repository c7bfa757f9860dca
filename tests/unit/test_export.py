"""Numbers of exports: those of a plain computation, in transformers and sentence-transformers; their tokens; and what
an export becomes that goes in and out again."""

import json
import shutil

import pytest
import torch

from nvembed_mcore.checkpoint.hf_export import ExportError, export
from nvembed_mcore.checkpoint.hf_load import exported_prompt, load_exported
from nvembed_mcore.cli import main
from nvembed_mcore.data.prompts import encode_texts, query_prompt
from nvembed_mcore.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from tests.helpers.exports import (
    CONFIG,
    INSTRUCTION,
    KINDS,
    LIMIT,
    PROMPT,
    TEXTS,
    Case,
    auto_model,
    sentence_transformer,
)

# Numbers


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_encode_agrees_with_a_plain_computation(cases, kind, implementation):
    model = auto_model(cases[kind].folder, attn_implementation=implementation)
    assert model.embedding_model.config._attn_implementation == implementation
    for prompt, instruction in (("", ""), (PROMPT, INSTRUCTION)):
        embeddings = model.encode(TEXTS, instruction=prompt, max_length=LIMIT, batch_size=3)
        assert embeddings.dtype == torch.float32 and not embeddings.requires_grad
        assert (embeddings - cases[kind].expected(TEXTS, instruction)).abs().max() < 1e-5
        assert (embeddings.norm(dim=1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("kind", ["latent", "self_attention", "multi_layer", "last"])
def test_a_causal_model_stays_causal(tokenizer_dir, tmp_path, kind):
    case = Case(kind, tokenizer_dir, tmp_path, causal=True)
    embeddings = load_exported(case.folder).encode(TEXTS, instruction=PROMPT, max_length=LIMIT)
    assert (embeddings - case.expected(TEXTS, INSTRUCTION)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers_gives_the_same(cases, kind):
    model, sentences = load_exported(cases[kind].folder), sentence_transformer(cases[kind].folder)
    assert sentences.max_seq_length == LIMIT and sentences.prompts == {"query": PROMPT, "document": ""}
    for prompt, how in (("", {}), (PROMPT, {"prompt_name": "query"}), (PROMPT, {"prompt": PROMPT})):
        ours = model.encode(TEXTS, instruction=prompt, max_length=LIMIT)
        theirs = torch.as_tensor(sentences.encode(TEXTS, batch_size=3, **how))
        assert torch.cosine_similarity(ours, theirs).min() >= 0.99999, how
        assert (theirs.norm(dim=1) - 1).abs().max() < 1e-5


@torch.no_grad()
def test_later_tokens_change_earlier_states_and_padding_changes_none(cases):
    model = load_exported(cases["self_attention"].folder)
    ids = torch.randint(3, 32000, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    states = model(ids, mask).last_hidden_state
    changed = ids.clone()
    changed[0, 8] += 1
    assert (model(changed, mask)[0][0, 0] - states[0, 0]).abs().max() > 1e-4
    changed = ids.clone()
    changed[1, 5:] += 7
    assert torch.equal(model(changed, mask)[0][1, :5], states[1, :5])
    assert (model(ids[1:, :5])[0][0] - states[1, :5]).abs().max() < 1e-5


@torch.no_grad()
def test_forward_can_be_indexed_with_and_without_a_pool_mask(cases):
    model = load_exported(cases["latent"].folder)
    ids = torch.tensor([[1, 500, 600, 2]])
    states = model(ids)
    assert states[0].shape == (1, 4, 32) and states.sentence_embeddings is None
    pool_mask = torch.tensor([[0, 1, 1, 1]])
    pooled = model(ids, torch.ones_like(ids), pool_mask)
    assert pooled["sentence_embeddings"] is pooled[0] and pooled[0].shape == (1, 32)
    expected = torch.nn.functional.normalize(states[0][0, 1:].mean(0), dim=0)
    assert (pooled[0][0] - expected).abs().max() < 1e-6
    assert torch.equal(model(ids, pool_mask=pool_mask, return_dict=False)[0], pooled[0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_of_half_precision_pools_in_float32(cases, tmp_path, dtype):
    cases["latent"].export(tmp_path / dtype, dtype=dtype)
    model = load_exported(tmp_path / dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    embeddings = model.encode(TEXTS, instruction=PROMPT, max_length=LIMIT)
    assert embeddings.dtype == torch.float32 and (embeddings.norm(dim=1) - 1).abs().max() < 1e-5
    cosine = torch.cosine_similarity(embeddings, cases["latent"].expected(TEXTS, INSTRUCTION))
    assert cosine.min() > (0.999 if dtype == "bfloat16" else 0.9999)


# Tokens


def test_a_cut_text_keeps_its_end(cases):
    tokenizer = load_exported(cases["mean"].folder).tokenizer
    for length in (3, 20):
        ids = tokenizer("word " * 100, truncation=True, max_length=length)["input_ids"]
        assert len(ids) == length and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1


def test_the_tokens_are_those_of_training(cases):
    trained, exported = load_tokenizer(cases["mean"].tokenizer_dir), load_exported(cases["mean"].folder).tokenizer
    for instruction in ("", INSTRUCTION):
        rows = encode_texts(trained, TEXTS, instruction, LIMIT).split()
        texts = [query_prompt(instruction) + text for text in TEXTS]
        assert exported(texts, truncation=True, max_length=LIMIT)["input_ids"] == [row.tolist() for row in rows]


def test_what_encode_refuses(cases):
    model = load_exported(cases["latent"].folder)
    needed = len(model.tokenizer(PROMPT)["input_ids"]) + 1  # <s>, the instruction, one token, </s>
    assert torch.isfinite(model.encode(["text"], instruction=PROMPT, max_length=needed)).all()
    with pytest.raises(ValueError, match=f"max_length = {needed - 1} leaves no room"):
        model.encode(["text"], instruction=PROMPT, max_length=needed - 1)
    with pytest.raises(ValueError, match="does not keep 'inter' apart from the text 'national'"):
        model.encode(["national"], instruction="inter")
    with pytest.raises(TypeError, match="list of strings"):
        model.encode("one string")


def test_encode_keeps_the_order_and_takes_no_text(cases):
    model = load_exported(cases["latent"].folder)
    together = model.encode(TEXTS, max_length=LIMIT, batch_size=2)
    alone = torch.cat([model.encode([text], max_length=LIMIT) for text in TEXTS])
    assert (together - alone).abs().max() < 1e-6
    assert model.encode([]).shape == (0, 32)
    assert model.encode(TEXTS[:2], return_numpy=True).dtype == "float32"


BROKEN = {
    "added_tokens null": ("tokenizer.json", lambda content: {**content, "added_tokens": None}),
    "added_tokens [1]": ("tokenizer.json", lambda content: {**content, "added_tokens": [1]}),
    "a list": ("tokenizer.json", lambda content: [content]),
    "model null": ("tokenizer.json", lambda content: {**content, "model": None}),
    "ids as text": ("tokenizer.json", lambda content: {**content, "model": {"vocab": {"a": "1"}}}),
    "normalizer as text": ("tokenizer.json", lambda content: {**content, "normalizer": "NFC"}),
    "a list of settings": ("tokenizer_config.json", lambda content: [content]),
    "bos_token null": ("tokenizer_config.json", lambda content: {**content, "bos_token": None}),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_malformed_tokenizer_is_not_exported(cases, tmp_path, how):
    name, change = BROKEN[how]
    folder = tmp_path / "tokenizer"
    shutil.copytree(cases["mean"].tokenizer_dir, folder)
    (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))
    with pytest.raises(ExportError, match=rf"cannot use the tokenizer in {folder}: "):
        cases["mean"].export(tmp_path / "new", tokenizer_dir=folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_number_that_float16_cannot_hold(cases, tmp_path):
    case = cases["mean"]
    settings = dict(tokenizer_dir=case.tokenizer_dir, attention_mask="bidirectional", max_tokens=LIMIT, card_facts={})
    message = r"cannot write .*new: model\.safetensors: tensor 'embedding_model\.embed.*largest 70000\.0"
    with pytest.raises(ExportError, match=message):
        export(
            lambda name: torch.full_like(case.read_global(name), 7e4),
            CONFIG,
            case.pooling,
            tmp_path / "new",
            dtype="float16",
            **settings,
        )
    assert list(tmp_path.iterdir()) == []


# In and out again


@pytest.mark.parametrize(("kind", "form"), [("latent", "nv-embed"), ("mean", "mean")])
def test_an_export_that_goes_in_and_out_again_is_the_same(cases, tmp_path, kind, form):
    first, again = tmp_path / "first", tmp_path / "again"
    cases[kind].export(first, format=form)
    assert main(["import-hf", str(first), str(tmp_path / "imported")]) == 0
    assert main(["export-hf", str(tmp_path / "imported"), str(again), "--format", form]) == 0
    names = {str(path.relative_to(first)) for path in first.rglob("*") if path.is_file()}
    assert {str(path.relative_to(again)) for path in again.rglob("*") if path.is_file()} == names
    for name in names - {"README.md"}:
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    assert exported_prompt(again) == PROMPT


@pytest.mark.parametrize(
    ("prompts", "is_named"),
    [({"query": "query: "}, True), ({"query": ["a"]}, True), ({}, False), (None, False), ({"query": ""}, False)],
)
def test_a_prompt_of_another_form_is_named_and_not_kept(cases, tmp_path, caplog, prompts, is_named):
    shutil.copytree(cases["mean"].folder, tmp_path / "source")
    file = tmp_path / "source/config_sentence_transformers.json"
    file.write_text(json.dumps({"prompts": prompts}))
    assert main(["import-hf", str(tmp_path / "source"), str(tmp_path / "imported")]) == 0
    warned = [record.getMessage() for record in caplog.records if str(file) in record.getMessage()]
    assert len(warned) == is_named and all(repr(prompts["query"]) in message for message in warned)
    assert main(["export-hf", str(tmp_path / "imported"), str(tmp_path / "again")]) == 0
    assert exported_prompt(tmp_path / "again") == ""


def test_a_tokenizer_that_changed_since_is_not_exported(cases, tmp_path, capsys):
    source, imported = tmp_path / "source", tmp_path / "imported"
    shutil.copytree(cases["mean"].folder, source)
    assert main(["import-hf", str(source), str(imported)]) == 0
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    tokenizer["normalizer"]["normalizers"].pop()
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    had = json.loads(next(imported.rglob("run.json")).read_text())["tokenizer"]
    has = tokenizer_fingerprint(load_tokenizer(source))
    capsys.readouterr()
    assert main(["export-hf", str(imported), str(tmp_path / "again")]) == 78
    message = capsys.readouterr().err
    assert f"the tokenizer in {source} is not the one of" in message and had in message and has in message
    assert not (tmp_path / "again").exists()
