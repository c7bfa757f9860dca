"""The code-search set: what counts as an item, what is dropped, and that training and test share nothing."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from nvembed_mcore import progress
from nvembed_mcore.data.near_duplicates import first_of_kind, word_parts
from nvembed_mcore.data.python_docs import FILES, STATISTICS, build_python_docs, statistics_table
from nvembed_mcore.data.python_docs_records import beir_folder, topic_records, topics, training_records
from nvembed_mcore.data.python_source import (
    DocumentedItem,
    SourceFile,
    documented_items,
    package_roots,
    source_files,
)
from nvembed_mcore.data.records import DataError, content_id, read_records
from nvembed_mcore.data.tokenizer import load_tokenizer, write_mistral_tokenizer

VERBS = ["open", "close", "merge", "split", "sort", "count", "hash", "draw", "fold", "join", "move", "send", "wrap"]
SETTINGS = {"held_out": 30, "min_topic_members": 5, "negatives": 4}
NOUNS = ["socket", "river", "matrix", "ticket", "parser", "galaxy", "invoice", "kernel", "violin", "garden", "ledger"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_mistral_tokenizer(folder)
    return load_tokenizer(folder)


def items_of(source: str, module: str = "pack.mod") -> list[DocumentedItem]:
    return list(documented_items(SourceFile("pack", module, Path("unused")), source.encode()))


def only_item(source: str) -> DocumentedItem:
    (item,) = items_of(source)
    return item


def make_tree(root: Path) -> Path:
    """A package of 13 modules with 11 functions each, every one with words of its own."""
    for i, verb in enumerate(VERBS):
        folder = root / ("left" if i % 2 else "right")
        folder.mkdir(parents=True, exist_ok=True)
        functions = []
        for k, noun in enumerate(NOUNS):
            other = VERBS[(i + k + 1) % len(VERBS)]
            functions.append(
                f"def {verb}_{noun}({noun}, level={i}):\n"
                f'    """{verb.title()}s one {noun} of size {k} and then {other}s what is left.\n\n'
                '    More.\n    """\n'
                f"    if {noun} is None:\n        return {verb}_{noun}({other}({k}), level)\n"
                f"    return [{other}({noun}, x * {i * k}) for x in range(level)]\n"
            )
        (folder / f"mod_{i}.py").write_text("\n\n".join(functions))
    return root


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------------------------------- duplicates


def test_word_parts() -> None:
    assert word_parts("XLMRoberta_self.attnV2 größe") == ["xlm", "roberta", "self", "attn", "v", "2", "gr", "öß", "e"]


def test_first_of_kind_agrees_with_exact_jaccard_similarity() -> None:
    base = [f"w{i}" for i in range(100)]
    texts = [base, [*base[:90], *(f"z{i}" for i in range(10))], [*base[:40], *(f"y{i}" for i in range(60))], base, []]
    # Sets of single words: the second shares 90 of 110 (0.82), the third 40 of 160 (0.25), the fourth all.
    assert first_of_kind(texts, ngram=1, threshold=0.7).tolist() == [True, False, True, False, True]
    assert first_of_kind(texts, ngram=1, threshold=0.95).tolist() == [True, True, True, False, True]
    # The same words in another order share no pair of words.
    reordered = [base, base[::-1]]
    assert first_of_kind(reordered, ngram=2, threshold=0.7).tolist() == [True, True]
    assert first_of_kind(reordered, ngram=1, threshold=0.7).tolist() == [True, False]


# ------------------------------------------------------------------------------------------------------------ records


def synthetic_items(modules: list[str], each: int) -> list[DocumentedItem]:
    return [
        DocumentedItem("p", module, f"f{k}", "function", f"Query {k} of {module}", f"def f{k}(): return '{module}'")
        for module in modules
        for k in range(each)
    ]


def test_negatives_are_neighbours_and_never_overlap() -> None:
    source = "".join(
        f"class C{k}:\n    'Class number {k} here'\n    x = {k}\n    def f(self):\n        'Method of class {k}'\n"
        f"        return {k}\n"
        for k in range(4)
    )
    items = items_of(source)
    records = list(training_records(items, negatives=4, seed=1))
    assert len(records) == 8
    for item, record in zip(items, records, strict=True):
        own_class = item.qualified_name.partition(".")[0]
        related = {other.code for other in items if other.qualified_name.partition(".")[0] == own_class}
        assert len(set(record["neg"])) == 4 and not related & set(record["neg"])
        assert record["neg_ids"] == [content_id(text) for text in record["neg"]]


def test_small_modules_borrow_negatives_from_their_folder_then_package() -> None:
    items = synthetic_items(["p.a.x", "p.a.y"], 2) + synthetic_items(["p.b.z"], 9)
    neighbours = {item.code: item.module for item in items}
    record = next(training_records(items, negatives=4, seed=0))
    assert [neighbours[text] for text in record["neg"]] == ["p.a.x", "p.a.y", "p.a.y", "p.b.z"]


def test_topics_and_their_records() -> None:
    items = synthetic_items(["p.nn.modules.a", "p.nn.modules.b", "p.nn.init", "p.io.x", "p.tiny"], 6)
    found = topics(items, min_members=6)
    assert {name: len(members) for name, members in found.items()} == {
        "p.io.x": 6,
        "p.nn.init": 6,
        "p.nn.modules": 12,
        "p.tiny": 6,
    }
    topic_of = {item.query: name for name, members in found.items() for item in members}
    records = list(topic_records(found, seed=3))
    assert len(records) == len(items)
    for record in records:
        assert record["pos"] != [record["query"]]
        assert {topic_of[text] for text in record["pos"]} == {topic_of[record["query"]]} == {record["topic"]}
        assert len(set(record["neg"])) == 7
        assert topic_of[record["query"]] not in {topic_of[text] for text in record["neg"]}


def test_nested_topics_give_each_other_no_negatives() -> None:
    items = synthetic_items(["p.nn.modules.a"], 10) + synthetic_items(["p.nn.x", "p.nn.y"], 5)
    found = topics(items + synthetic_items(["p.io.z"], 10), min_members=10)
    assert list(found) == ["p.io.z", "p.nn", "p.nn.modules"]
    for record in topic_records(found, seed=0):
        if record["topic"] != "p.io.z":
            assert all("p.io.z" in text for text in record["neg"])


def test_documents_that_become_equal_by_hiding_names_are_one() -> None:
    sources = [f'def {name}(x):\n    "Query about {name} here"\n    return x' for name in ("first", "second")]
    items = [only_item(source) for source in sources]
    assert len(beir_folder(items, hide_names=False)["corpus.jsonl"]) == 2
    hidden = beir_folder(items, hide_names=True)
    assert len(hidden["corpus.jsonl"]) == 1 and len(hidden["queries.jsonl"]) == 2
    document = hidden["corpus.jsonl"][0]["_id"]
    assert hidden["qrels/test.tsv"].count(f"\t{document}\t1\n") == 2


# ------------------------------------------------------------------------------------------------------ the whole set


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> tuple[Path, Path]:
    """Source tree and the set built from it."""
    root = tmp_path_factory.mktemp("source")
    tree = make_tree(root / "tree")
    (tree / "broken.py").write_text("def f(:\n")
    (tree / "latin.py").write_bytes('def f():\n    "Doc of three words"\n    return "\xe9"\n'.encode("latin-1"))
    (tree / "null.py").write_bytes(b"x = 1\x00\n")
    declared = '# -*- coding: latin-1 -*-\ndef gänge():\n    "Zählt über viele Gänge"\n    return len(gears) * 7\n'
    (tree / "declared.py").write_bytes(declared.encode("latin-1"))
    (tree / "tests").mkdir()
    (tree / "tests" / "helper.py").write_text('def f():\n    "Doc in a tests folder"\n    return 99\n')
    (tree / "test_x.py").write_text('def f():\n    "Doc in a test file"\n    return 98\n')
    # A copy of a module under another name, as libraries of models have many.
    (tree / "copied.py").write_text((tree / "left" / "mod_1.py").read_text().replace("level", "depth"))
    build_python_docs(root / "out", tokenizer, packages={"tree": tree}, **SETTINGS)
    return tree, root / "out"


def test_statistics_and_table(built: tuple[Path, Path]) -> None:
    statistics = json.loads((built[1] / STATISTICS).read_text())
    assert statistics["files"] == {"parsed": 15, "skipped": 3}
    assert statistics["documented"] == 13 * 11 + 1 + 11
    dropped = sum(statistics["dropped"].values())
    train, heldout = statistics["train_pairs"], statistics["heldout_queries"]
    assert train + heldout + dropped == statistics["documented"] and dropped >= 11
    assert heldout >= 30 and train == len(read_jsonl(built[1] / "train.jsonl"))
    assert statistics["packages"] == {"tree": {"documented": 155, "train": train, "heldout": heldout}}
    assert statistics["tokens"]["train query"]["p50"] > 5


def test_training_records_are_valid_and_ids_follow_from_content(built: tuple[Path, Path]) -> None:
    records = list(read_records(built[1] / "train.jsonl"))
    for record in records:
        assert record.query_id == content_id(record.query)
        assert record.pos_ids == (content_id(record.pos[0]),)
        assert record.neg_ids == tuple(content_id(text) for text in record.neg)
        assert len(record.neg) == 4 and not set(record.pos_ids) & set(record.neg_ids)
    assert len({record.query_id for record in records}) == len({record.pos_ids for record in records}) == len(records)
    assert list(read_records(built[1] / "stage2_topics.jsonl"))


def test_no_docstring_in_any_document(built: tuple[Path, Path]) -> None:
    train = read_jsonl(built[1] / "train.jsonl")
    corpus = {row["_id"]: row["text"] for row in read_jsonl(built[1] / "heldout" / "corpus.jsonl")}
    texts = [text for record in train for text in record["pos"] + record["neg"]] + list(corpus.values())
    for text in texts:
        (definition,) = ast.parse(text).body
        assert ast.get_docstring(definition) is None and "what is left" not in text


def test_training_and_test_share_no_module_document_or_query(built: tuple[Path, Path]) -> None:
    tree, out = built
    module_of = {}
    for file in source_files("tree", tree):
        try:
            items = list(documented_items(file, file.path.read_bytes()))
        except (SyntaxError, ValueError):
            continue
        for item in items:
            module_of.setdefault((item.query, item.code), item.module)
    train = read_jsonl(out / "train.jsonl")
    corpus = {row["_id"]: row["text"] for row in read_jsonl(out / "heldout" / "corpus.jsonl")}
    queries = {row["_id"]: row["text"] for row in read_jsonl(out / "heldout" / "queries.jsonl")}
    header, *qrels = (out / "heldout" / "qrels" / "test.tsv").read_text().splitlines()
    assert header == "query-id\tcorpus-id\tscore" and len(qrels) == len(queries) == len(corpus)
    judged = [line.split("\t") for line in qrels]
    test_modules = {module_of[queries[query], corpus[document]] for query, document, _ in judged}
    train_modules = {module_of[record["query"], record["pos"][0]] for record in train}
    assert test_modules and train_modules and not test_modules & train_modules
    assert not set(corpus) & {i for record in train for i in record["pos_ids"] + record["neg_ids"]}
    assert not set(queries) & {record["query_id"] for record in train}
    topic_texts = {
        text for record in read_jsonl(out / "stage2_topics.jsonl") for text in record["pos"] + record["neg"]
    }
    assert not topic_texts & set(queries.values())


def test_names_are_hidden_in_the_second_test_set(built: tuple[Path, Path]) -> None:
    plain, hidden = built[1] / "heldout", built[1] / "heldout_hidden_names"
    assert (plain / "queries.jsonl").read_bytes() == (hidden / "queries.jsonl").read_bytes()
    rows = read_jsonl(hidden / "corpus.jsonl")
    assert all(row["_id"] == content_id(row["text"]) and row["title"] == "" for row in rows)
    names = {re.search(r"def (\w+)", row["text"]).group(1) for row in read_jsonl(plain / "corpus.jsonl")}
    for row in rows:
        assert "def some_function(" in row["text"] and not names & set(re.findall(r"\w+", row["text"]))


def test_same_input_same_bytes_and_reuse(
    built: tuple[Path, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch, capsys
) -> None:
    tree, out = built

    def build(**changes: int) -> set[str]:
        build_python_docs(tmp_path / "again", tokenizer, packages={"tree": tree}, **{**SETTINGS, **changes})
        return {line.partition(":")[0] for line in capsys.readouterr().err.splitlines()}

    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.0)
    assert build() == {"parse", "compare", "drop duplicates", "count tokens"}
    assert all((out / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in (*FILES, STATISTICS))
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    assert build() == set()  # complete and of the same inputs: nothing is done
    with pytest.raises(DataError, match="holds another set .seed is 0, asked for 1"):
        build(seed=1)
    assert capsys.readouterr().err == ""  # refused before anything is done
    assert all((out / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in (*FILES, STATISTICS))


def test_the_seed_decides_what_is_held_out(
    built: tuple[Path, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    build_python_docs(tmp_path / "out", tokenizer, packages={"tree": built[0]}, seed=1, **SETTINGS)
    name = Path("heldout") / "queries.jsonl"
    first, second = ({row["_id"] for row in read_jsonl(root / name)} for root in (built[1], tmp_path / "out"))
    assert first and second and first != second


def test_too_long_items_are_dropped(
    built: tuple[Path, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    statistics = build_python_docs(
        tmp_path / "out",
        tokenizer,
        packages={"tree": built[0]},
        held_out=5,
        max_document_tokens=55,
        max_query_tokens=20,
    )
    assert statistics.dropped["too long"] > 0
    for record in read_jsonl(tmp_path / "out" / "train.jsonl"):
        assert len(tokenizer(record["query"], add_special_tokens=False)["input_ids"]) <= 20
        assert len(tokenizer(record["pos"][0], add_special_tokens=False)["input_ids"]) <= 55
    console = Console(width=120)
    with console.capture() as capture:
        console.print(statistics_table(statistics))
    text = capture.get()
    assert f"{statistics.train_pairs:,}" in text and "dropped: too long" in text


def test_bad_input(built: tuple[Path, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no_such_package.*not installed"):
        package_roots(["no_such_package"])
    with pytest.raises(DataError, match="no source folder at"):
        package_roots({"x": tmp_path / "missing"})
    with pytest.raises(DataError, match="cannot hold out 1000 queries"):
        build_python_docs(tmp_path / "out", tokenizer, packages={"tree": built[0]}, held_out=1000)
    assert not (tmp_path / "out").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(DataError, match="holds other files"):
        build_python_docs(tmp_path / "other", tokenizer, packages={"tree": built[0]}, held_out=30)
