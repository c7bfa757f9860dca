"""Embedders in one process: the numbers of a plain computation, whatever kind of folder a model comes from."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from nvembed_mcore.data.prompts import query_prompt
from nvembed_mcore.evaluation.embedders import open_embedder
from nvembed_mcore.parallel.groups import shutdown
from tests.helpers import exports
from tests.helpers.exports import INSTRUCTION, KINDS, LIMIT, PROMPT, TEXTS, Case, auto_model


@pytest.fixture(scope="module", autouse=True)
def groups():
    yield
    shutdown()


def assert_expected(embedder, case, instruction=INSTRUCTION):
    for is_query in (True, False):
        found = embedder.embed(TEXTS, is_query)
        assert found.dtype == np.float32 and found.shape == (len(TEXTS), 32)
        expected = case.expected(TEXTS, instruction if is_query else "")
        assert np.abs(found - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_gives_the_numbers_of_a_plain_computation(cases, kind):
    embedder = open_embedder(str(cases[kind].folder), token_budget=60)
    assert (embedder.dim, embedder.num_replicas, embedder.replica, embedder.is_writer) == (32, 1, 0, True)
    assert_expected(embedder, cases[kind])
    assert embedder.tokens == embedder.positions > 100  # nothing is padded


@pytest.mark.parametrize("kind", ["latent", "mean"])
def test_an_export_gives_the_numbers_of_its_modelling_file(cases, kind):
    embedder = open_embedder(str(cases[kind].folder))
    model = auto_model(cases[kind].folder)
    for is_query, prompt in ((True, PROMPT), (False, "")):
        theirs = model.encode(TEXTS, instruction=prompt, max_length=LIMIT).numpy()
        assert np.abs(embedder.embed(TEXTS, is_query) - theirs).max() < 1e-5


@pytest.mark.parametrize("kind", ["latent", "last"])
def test_a_causal_export_stays_causal(tokenizer_dir, tmp_path, kind):
    case = Case(kind, tokenizer_dir, tmp_path, causal=True)
    assert_expected(open_embedder(str(case.folder)), case)


def test_a_plain_mistral_model_with_a_mean(tokenizer_dir, tmp_path):
    """The format `mean`, and the same weights as a base model: without metadata a causal mean."""
    case = Case("mean", tokenizer_dir, tmp_path)
    case.export(tmp_path / "plain", format="mean")
    assert_expected(open_embedder(str(tmp_path / "plain")), case)
    base = Case("mean", tokenizer_dir, tmp_path / "base", causal=True)
    base.reference.save_pretrained(tmp_path / "mistral")
    embedder = open_embedder(str(tmp_path / "mistral"), tokenizer=str(tokenizer_dir), max_length=LIMIT)
    assert embedder.facts(True)["prompt"] == ""
    assert_expected(embedder, base, instruction="")


def test_instruction_and_limit_of_the_user(cases):
    embedder = open_embedder(str(cases["latent"].folder), instruction="Find it", max_length=20)
    assert embedder.facts(True)["prompt"] == "Instruct: Find it\nQuery: "
    assert embedder.facts(False)["prompt"] == "" and embedder.facts(False)["max_tokens"] == 20
    model = auto_model(cases["latent"].folder)
    theirs = model.encode(TEXTS, instruction=query_prompt("Find it"), max_length=20).numpy()
    assert np.abs(embedder.embed(TEXTS, True) - theirs).max() < 1e-5


def test_no_texts_and_the_order_of_texts(cases):
    embedder = open_embedder(str(cases["latent"].folder), token_budget=40)
    assert embedder.embed([], True).shape == (0, 32)
    forward, backward = embedder.embed(TEXTS, False), embedder.embed(TEXTS[::-1], False)
    assert np.abs(forward - backward[::-1]).max() < 1e-6
    np.testing.assert_array_equal(embedder.embed(TEXTS, False), forward)


def test_no_gradients_and_no_buffers_for_them(cases):
    embedder = open_embedder(str(cases["latent"].folder))
    for chunk in embedder._chunks:
        assert not hasattr(chunk, "buffers_for_gradients") and not chunk.training
        assert all(not one.requires_grad and not hasattr(one, "main_grad") for one in chunk.parameters())


def test_fingerprints_follow_what_the_numbers_depend_on(cases, tmp_path):
    folder = cases["mean"].folder
    first = open_embedder(str(folder)).fingerprint
    assert open_embedder(str(folder), token_budget=30).fingerprint == first
    shutil.copytree(folder, tmp_path / "copy")
    assert open_embedder(str(tmp_path / "copy")).fingerprint == first
    changed = open_embedder(str(folder), instruction="Find it")
    assert changed.fingerprint != first
    # Of documents no instruction is part, so what was made of them stays good.
    assert changed.facts(False) == open_embedder(str(folder)).facts(False)
    assert open_embedder(str(cases["last"].folder)).fingerprint != first


# sentence-transformers


@pytest.mark.parametrize("kind", ["latent", "mean"])
def test_sentence_transformers_gives_the_numbers_of_ours(cases, kind):
    ours = open_embedder(str(cases[kind].folder))
    theirs = open_embedder(f"st:{cases[kind].folder}", trust_remote_code=True, token_budget=3 * LIMIT)
    assert (theirs.dim, theirs.num_replicas, theirs.is_writer) == (32, 1, True)
    for is_query in (True, False):
        found = theirs.embed(TEXTS, is_query)
        assert found.dtype == np.float32
        assert np.abs(found - ours.embed(TEXTS, is_query)).max() < 1e-5
    for instruction in ("", "Find it"):  # of these texts, whatever the model's own is
        found = theirs.embed(TEXTS, True, instruction)
        assert np.abs(found - ours.embed(TEXTS, True, instruction)).max() < 1e-5
        expected = cases[kind].expected(TEXTS, instruction)
        assert np.abs(found - expected.numpy()).max() < 1e-5
    assert theirs.tokens == ours.tokens and theirs.positions > ours.positions
    assert theirs.embed([], False).shape == (0, 32)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return exports.tiny_bert(tmp_path_factory.mktemp("bert"))


def test_any_model_of_sentence_transformers(bert):
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(bert), device="cpu")
    texts = ["abc", "a much longer text " * 3, "x y z"]

    def expected(prompt):
        found = plain.encode([prompt + text for text in texts], batch_size=1)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    for how, query, document in (
        ({}, "", ""),
        ({"instruction": "find"}, query_prompt("find"), ""),
        ({"query_prompt": "q: ", "document_prompt": "d: ", "instruction": "find"}, "q: ", "d: "),
    ):
        embedder = open_embedder(f"st:{bert}", token_budget=64, **how)
        assert [embedder.facts(is_query)["prompt"] for is_query in (True, False)] == [query, document]
        assert np.abs(embedder.embed(texts, True) - expected(query)).max() < 1e-5
        assert np.abs(embedder.embed(texts, False) - expected(document)).max() < 1e-5
    assert open_embedder(f"st:{bert}", max_length=8).facts(True)["max_tokens"] == 8
    assert embedder.fingerprint != open_embedder(f"st:{bert}").fingerprint


def test_the_fingerprint_of_a_model_follows_its_pooling_and_its_tokenizer(bert, tmp_path):
    first = open_embedder(f"st:{bert}").fingerprint
    shutil.copytree(bert, tmp_path / "copy")
    assert open_embedder(f"st:{tmp_path / 'copy'}").fingerprint == first
    shutil.copytree(bert, tmp_path / "pooling")
    file = tmp_path / "pooling" / "1_Pooling" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pooling_mode": "cls"}))
    shutil.copytree(bert, tmp_path / "tokenizer")
    file = tmp_path / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"do_lower_case": False}))
    found = {open_embedder(f"st:{tmp_path / name}").fingerprint for name in ("pooling", "tokenizer")}
    assert len(found | {first}) == 3


def test_fp8_rounds_a_little_and_says_so(cases):
    """Embeddings of different precision are told apart by their facts."""
    export = str(cases["latent"].folder)
    plain, rounded = (open_embedder(export, fp8=fp8) for fp8 in ("off", "blockwise"))
    assert rounded.facts(True) == plain.facts(True) | {"fp8": "blockwise"} and "fp8" not in plain.facts(True)
    assert rounded.fingerprint != plain.fingerprint
    cosines = (plain.embed(TEXTS, True) * rounded.embed(TEXTS, True)).sum(1)
    assert 0.9 < cosines.min() < 1 - 1e-6
