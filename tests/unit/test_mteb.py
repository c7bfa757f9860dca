"""Tasks of mteb on our models: the scores that mteb computes for the export, instructions, resumption, refusals."""

from __future__ import annotations

import json
import sys

import mteb
import numpy as np
import pytest
import torch
from mteb.models.abs_encoder import AbsEncoder

from nvembed_mcore.evaluation.embedders import open_embedder
from nvembed_mcore.evaluation.mteb.instructions import MtebError, Sides, load_instructions
from nvembed_mcore.evaluation.mteb.run import evaluate_mteb, name_of_model
from nvembed_mcore.evaluation.mteb.share import assemble, blocks_of
from nvembed_mcore.evaluation.mteb.tasks import english_tasks, find_tasks, parts_of
from tests.helpers import mteb_tasks
from tests.helpers.exports import Case, sentence_transformer
from tests.helpers.mteb_tasks import INSTRUCTIONS, KINDS

NAME = "test/model"
SYMMETRIC = ("Classification", "Clustering", "PairClassification", "STS", "Summarization")


@pytest.fixture(scope="module")
def folder(modules_cache, tokenizer_dir, tmp_path_factory):
    torch.manual_seed(0)  # scores of classes and clusters jump where two of them are equally near
    return Case("latent", tokenizer_dir, tmp_path_factory.mktemp("exports")).folder


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    file = tmp_path_factory.mktemp("instructions") / "own.yaml"
    file.write_text(INSTRUCTIONS, encoding="utf-8")
    return load_instructions(file)


@pytest.fixture(scope="module")
def embedder(folder):
    return open_embedder(str(folder))


@pytest.fixture(scope="module")
def finished(embedder, own, tmp_path_factory):
    """All small tasks, once: (folder, scores)."""
    output = tmp_path_factory.mktemp("output")
    return output, evaluate_mteb(embedder, [kind() for kind in KINDS], name=NAME, instructions=own, folder=output)


def revision_folder(output):
    (found,) = (output / "results" / "test__model").iterdir()
    return found


def numbers_of(scores: dict) -> dict[str, float]:
    return {name: value for name, value in scores.items() if isinstance(value, float) and not np.isnan(value)}


# Scores


@pytest.fixture(scope="module")
def reference(folder, own):
    """The export as mteb itself loads it, with the same prompts."""
    published = load_instructions("published").prompts()
    wrapper = mteb.models.SentenceTransformerEncoderWrapper(sentence_transformer(folder), model_prompts=published)
    assert wrapper.model_prompts == published
    wrapper.model_prompts = own.prompts()  # after it is made, for its check knows registered tasks only
    return wrapper


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.metadata.name)
def test_scores_are_those_of_mteb_and_sentence_transformers(finished, reference, kind, monkeypatch):
    monkeypatch.setattr(mteb_tasks.SmallRetrieval, "empty", ".")  # the export refuses a text without tokens
    output, scores = finished
    theirs = mteb.evaluate(
        reference, kind(), cache=None, show_progress_bar=False, encode_kwargs={"batch_size": 16}
    ).task_results[0]
    (expected,) = theirs.scores["test"]
    stored = json.loads((revision_folder(output) / f"{kind.metadata.name}.json").read_text())
    (found,) = stored["scores"]["test"]
    assert len(numbers_of(expected)) > 3 or kind.metadata.type == "Clustering"
    assert numbers_of(found) == pytest.approx(numbers_of(expected), abs=1e-4)
    (score,) = (one for one in scores if one.task == kind.metadata.name)
    assert score.score == pytest.approx(100 * theirs.get_score(), abs=1e-2)
    assert score.kind == kind.metadata.type


def test_results_are_read_by_mteb(finished):
    output, scores = finished
    names = [kind.metadata.name for kind in KINDS]
    read = mteb.ResultCache(output).load_results(models=[NAME], tasks=[kind() for kind in KINDS])
    (model,) = read.model_results
    assert set(read.to_dataframe()["task_name"]) == set(names)
    assert model.model_name == NAME and model.model_revision == revision_folder(output).name
    assert sorted(one.task_name for one in model.task_results) == sorted(names)
    assert {one.task_name: 100 * one.get_score() for one in model.task_results} == pytest.approx(
        {one.task: one.score for one in scores}
    )


# Instructions


class Spy:
    """An embedder that remembers what stood before which texts."""

    dim, num_replicas, replica, is_writer = 4, 1, 0, True

    def __init__(self):
        self.seen = {}

    def facts(self, is_query):
        return {"weights": "1", "prompt": f"own {is_query}", "max_tokens": 32}

    def embed(self, texts, is_query, instruction=None):
        assert all(text.strip() for text in texts) and len(set(texts)) == len(texts)
        for text in texts:
            self.seen.setdefault(text, set()).add((is_query, instruction))
        values = np.random.default_rng(len(texts)).normal(size=(len(texts), 4))
        return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def seen_by(task, instructions, output):
    """What stood before queries, and before documents or texts without a side."""
    spy = Spy()
    evaluate_mteb(spy, [task], name=NAME, instructions=instructions, folder=output)
    sides = {True: set(), False: set()}
    for places in spy.seen.values():
        for is_query, instruction in places:
            sides[is_query].add(instruction)
    return sides


def test_each_side_gets_its_own(own, tmp_path):
    sides = seen_by(mteb_tasks.SmallRetrieval(), own, tmp_path)
    assert sides == {True: {"Find the same topic"}, False: {"A text of a topic"}}
    assert seen_by(mteb_tasks.SmallReranking(), own, tmp_path) == {True: {"Find the topic"}, False: {""}}
    assert seen_by(mteb_tasks.SmallSts(), own, tmp_path) == {
        True: set(),
        False: {"Retrieve semantically similar text"},
    }
    assert seen_by(mteb_tasks.SmallRetrieval(), None, tmp_path) == {True: {None}, False: {None}}


@pytest.mark.parametrize("name", ["paper", "published"])
@pytest.mark.parametrize("benchmark", ["MTEB(eng, v1)", "MTEB(eng, v2)"])
def test_every_english_task_has_instructions(name, benchmark):
    table = load_instructions(name)
    tasks = [part for task in find_tasks([benchmark]) for part in parts_of(task)]
    assert len(tasks) == {"MTEB(eng, v1)": 56 - 1 + 12, "MTEB(eng, v2)": 41}[benchmark]
    for task in tasks:
        sides = table.of(task.metadata.name, task.metadata.type)
        both = name == "published" and task.metadata.name == "QuoraRetrieval"
        assert sides.query and sides.document == (sides.query if both else ""), task.metadata.name


def test_mteb_takes_the_prompts_of_a_table():
    prompts = load_instructions("published").prompts()
    assert AbsEncoder.validate_task_to_prompt_name(prompts) is prompts  # it raises for a name that it does not know
    assert prompts["NQ"] == "Instruct: Given a question, retrieve passages that answer the question\nQuery: "
    assert prompts["NQ-document"] == "" and prompts["QuoraRetrieval-document"] == prompts["QuoraRetrieval"]
    assert prompts["STS"].startswith("Instruct: Retrieve semantically similar text")


def test_the_two_tables_differ_where_they_are_known_to():
    paper, published = load_instructions("paper"), load_instructions("published")
    assert paper.types == published.types and set(paper.tasks) == set(published.tasks)
    assert {name for name in paper.tasks if paper.tasks[name] != published.tasks[name]} == {
        "FiQA2018",
        "QuoraRetrieval",
        "Touche2020",
        "Touche2020Retrieval.v3",
    }
    assert paper.tasks["FiQA2018"].query.endswith("retrieve user replies that best answer the question")
    assert published.tasks["FiQA2018"].query.endswith("retrieve relevant passages that answer the query")
    assert published.tasks["Touche2020"].query == "Given a question, retrieve passages that answer the question"


def test_a_table_on_top_of_another(tmp_path):
    (tmp_path / "own.yaml").write_text(INSTRUCTIONS)
    (tmp_path / "more.yaml").write_text("base: own.yaml\ntasks: {FiQA2018: {document: A reply}}\n")
    table = load_instructions(tmp_path / "more.yaml")
    assert table.name == "more" and table.of("FiQA2018", "Retrieval") == Sides("", "A reply")
    assert table.of("SmallReranking", "Reranking").query == "Find the topic"
    assert table.of("STS12", "STS") == load_instructions("paper").of("STS12", "STS")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("tasks: [", ["bad.yaml", "line 1"]),
        ("- STS12", ["bad.yaml", "base, tasks, types"]),
        ("task: {STS12: x}", ["bad.yaml", "base, tasks, types", "task"]),
        ("tasks: STS12", ["bad.yaml", "tasks", "STS12"]),
        ("tasks: {STS12: ' '}", ["bad.yaml", "tasks.STS12", "' '"]),
        ("types: {STS: {query: a, passage: b}}", ["bad.yaml", "types.STS", "passage"]),
        ("types: {STS: {query: 3}}", ["bad.yaml", "types.STS", "3"]),
        ("base: bad.yaml", ["bad.yaml", "its own base"]),
        ("base: none.yaml", ["none.yaml"]),
    ],
)
def test_bad_tables(tmp_path, content, words):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(MtebError) as caught:
        load_instructions(file)
    for word in words:
        assert word in str(caught.value)


# Which tasks


def test_names_of_tasks():
    english = english_tasks()
    assert len(english) == 56 and find_tasks(["english"]) == find_tasks(["MTEB(eng, v1)", "STS12", "english"])
    (one,) = find_tasks(["STS17"])
    assert one.hf_subsets == ["en-en"]  # of eleven languages
    (other,) = find_tasks(["STS22.v2"])
    assert len(other.hf_subsets) > 1
    with pytest.raises(MtebError, match="'STS71'.*did you mean .*STS17"):
        find_tasks(["STS71"])


def test_a_task_without_instructions_stops_before_any_data(embedder, tmp_path):
    mteb_tasks.SmallSts.loads = 0
    with pytest.raises(MtebError, match="'paper' have none for SmallReranking .*`SmallReranking: ...`"):
        tasks = [mteb_tasks.SmallSts(), mteb_tasks.SmallReranking()]
        evaluate_mteb(embedder, tasks, name=NAME, instructions=load_instructions("paper"), folder=tmp_path)
    assert mteb_tasks.SmallSts.loads == 0


def test_data_that_cannot_be_loaded(tmp_path):
    class Gone(mteb_tasks.SmallSts):
        def make(self):
            raise ConnectionError("the hub is not there")

    with pytest.raises(MtebError, match="data of SmallSts: the hub is not there. It downloads"):
        evaluate_mteb(Spy(), [Gone()], name=NAME, instructions=None, folder=tmp_path)


def test_without_mteb(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mteb", None)
    with pytest.raises(MtebError, match=r"pip install nvembed_mcore\[eval\]"):
        evaluate_mteb(Spy(), ["STS12"], name=NAME, instructions=None, folder=tmp_path)


def test_names_of_models(tmp_path):
    assert name_of_model(str(tmp_path / "runs" / "small")) == "runs/small"
    assert name_of_model("st:intfloat/e5-small@" + 40 * "a") == "intfloat/e5-small"
    with pytest.raises(MtebError, match="--name small"):
        evaluate_mteb(Spy(), ["STS12"], name="small", instructions=None, folder=tmp_path)


# Resumption


def test_a_task_with_a_result_is_not_run_again(own, tmp_path):
    def run(*kinds, **options):
        spy = Spy()
        for kind in KINDS:
            kind.loads = 0
        tasks = [kind() for kind in kinds]
        said = []
        scores = evaluate_mteb(
            spy, tasks, name=NAME, folder=tmp_path, progress=lambda *what: said.append(what), **options
        )
        return [kind for kind in kinds if kind.loads], scores, said

    sts, pairs = mteb_tasks.SmallSts, mteb_tasks.SmallPairs
    loaded, first, said = run(sts, instructions=own)
    assert loaded == [sts] and [one[:2] for one in (said[0], said[-1])] == [(0, 1), (1, 1)]
    assert "SmallSts, about" in said[1][2] and said[-1][2] == f"SmallSts: {first[0].score:.2f}"
    loaded, second, _ = run(sts, pairs, instructions=own)
    assert loaded == [pairs] and second[0] == first[0]
    assert run(sts, pairs, instructions=own)[0] == []
    (revision_folder(tmp_path) / "SmallSts.json").unlink()
    assert run(sts, pairs, instructions=own)[0] == [sts]
    assert run(sts, pairs, instructions=own, overwrite=True)[0] == [sts, pairs]
    assert run(sts, instructions=load_instructions("paper"))[0] == [sts]  # another table, other results
    assert len(list((tmp_path / "results" / "test__model").iterdir())) == 2


def test_results_of_another_instruction_are_not_taken(tmp_path):
    file = tmp_path / "own.yaml"
    for text, options in (("Find it", {}), ("Find more", {"overwrite": True}), ("Find all", {})):
        file.write_text(f"types: {{STS: {text}}}")
        how = dict(name=NAME, instructions=load_instructions(file), folder=tmp_path, **options)
        if text != "Find all":
            evaluate_mteb(Spy(), [mteb_tasks.SmallSts()], **how)
    with pytest.raises(MtebError, match="SmallSts.json was made with .*'Find more'.*'Find all'.*--overwrite"):
        evaluate_mteb(Spy(), [mteb_tasks.SmallSts()], **how)


def test_a_task_of_several_parts(own, tmp_path):
    """CQADupStack is one of the 56, and has twelve."""
    (score,) = evaluate_mteb(Spy(), [mteb_tasks.SmallParts()], name=NAME, instructions=own, folder=tmp_path)
    written = {file.stem: json.loads(file.read_text()) for file in revision_folder(tmp_path).glob("Small*.json")}
    parts = [written[name]["scores"]["test"][0]["main_score"] for name in ("SmallFirstPart", "SmallOtherPart")]
    assert score.score == pytest.approx(100 * np.mean(parts))
    assert written["SmallParts"]["scores"]["test"][0]["main_score"] == pytest.approx(np.mean(parts))
    spy = Spy()
    assert evaluate_mteb(spy, [mteb_tasks.SmallParts()], name=NAME, instructions=own, folder=tmp_path) == [score]
    assert spy.seen == {}


# Shares


def test_blocks_hold_every_text_once_and_similar_lengths():
    draw = np.random.default_rng(0)
    texts = ["x" * size for size in draw.integers(1, 400, 200)]
    blocks = blocks_of(texts, max_tokens=50, characters=1000)
    assert sorted(place for block in blocks for place in block) == list(range(200))
    lengths = [len(texts[place]) for block in blocks for place in block]
    assert lengths == sorted(lengths, reverse=True)
    for block in blocks:
        counted = [min(len(texts[place]), 200) for place in block]
        assert sum(counted) <= 1000 and len(block) >= 5  # what a limit cuts off does not count
    assert blocks_of([], 50, 1000) == [] and blocks_of(["x" * 99], 50, 10) == [[0]]
    rows = np.arange(400, dtype=np.float32).reshape(200, 2)
    shares = [[place for block in blocks[rank::3] for place in block] for rank in range(3)]
    parts = [(share, rows[share]) for share in shares]
    np.testing.assert_array_equal(assemble([parts[0], None, parts[1], None, parts[2]], 2), rows)
