"""Question answering and fact checking sets become records."""

import json

import pytest

from nvembed_mcore.data.convert import convert
from nvembed_mcore.data.records import content_id
from tests.unit.test_convert_pairs import triples
from tests.unit.test_convert_tasks import converted, jsonl


def from_json(tmp_path, layout, document, **options):
    """Counts and rows of a conversion of one JSON file."""
    source, output = tmp_path / "source.json", tmp_path / "out.jsonl"
    source.write_text(json.dumps(document, indent=1))
    counts = convert(layout, [source], output, overwrite=True, **options)
    return counts, [json.loads(line) for line in output.read_text().splitlines()]


SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Rice",
            "paragraphs": [
                {
                    "context": "Rice is a grain.",
                    "qas": [
                        {"id": "1", "question": "What is rice?", "answers": [{"text": "a grain", "answer_start": 8}]},
                        {"id": "2", "question": "Who sold it?", "answers": [], "is_impossible": True},
                    ],
                },
                {
                    "context": "Rice grows in water.",
                    "qas": [{"id": "3", "question": "Where does it grow?", "answers": [{"text": "in water"}]}],
                },
                {"context": "Rice is white.", "qas": []},
            ],
        },
        {
            "title": "Tea",
            "paragraphs": [
                {"context": "Tea is hot.", "qas": [{"id": "4", "question": "How?", "answers": [{"text": "hot"}]}]}
            ],
        },
    ],
}


def test_squad(tmp_path):
    counts, rows = from_json(tmp_path, "squad", SQUAD)
    assert triples(rows) == [
        ("What is rice?", ["Rice is a grain."], ["Rice grows in water.", "Rice is white."]),
        ("Where does it grow?", ["Rice grows in water."], ["Rice is a grain.", "Rice is white."]),
        ("How?", ["Tea is hot."], []),
    ]
    assert [row["query_id"] for row in rows] == ["1", "3", "4"]
    assert rows[0]["pos_ids"] == [content_id("Rice is a grain.")]
    assert counts.left_out == {"the question has no answer": 1}
    _, rows = from_json(tmp_path, "squad", SQUAD, negatives=1)
    assert [len(row["neg"]) for row in rows] == [1, 1, 0]


def test_squad_rows(tmp_path):
    flat = [
        {"id": q["id"], "title": a["title"], "context": p["context"], "question": q["question"]}
        | {"answers": {"text": [one["text"] for one in q["answers"]], "answer_start": []}}
        for a in SQUAD["data"]
        for p in a["paragraphs"]
        for q in p["qas"]
    ]
    counts, rows = converted(tmp_path, "squad", flat)
    assert triples(rows) == [
        ("What is rice?", ["Rice is a grain."], ["Rice grows in water."]),
        ("Where does it grow?", ["Rice grows in water."], ["Rice is a grain."]),
        ("How?", ["Tea is hot."], []),
    ]
    assert counts.left_out == {"the question has no answer": 1}


def context(title, text, number=None):
    return {"title": title, "text": text, "score": 1} | ({} if number is None else {"passage_id": number})


DPR = [
    {
        "dataset": "nq",
        "question": "who wrote it",
        "answers": ["Ann"],
        "positive_ctxs": [context("Book", "Ann wrote it.", "11"), context("Ann", "Ann writes.", 12)],
        "negative_ctxs": [context("Car", "Cars drive.", "13"), context("Ann", "Ann writes.", 12)],
        "hard_negative_ctxs": [context("Book", "Books have pages.", "14"), context("", "No title.")],
    },
    {"question": "nothing found", "answers": [], "positive_ctxs": [], "negative_ctxs": [], "hard_negative_ctxs": []},
]


def test_dpr(tmp_path):
    counts, rows = from_json(tmp_path, "dpr", DPR)
    assert triples(rows) == [
        ("who wrote it", ["Book Ann wrote it."], ["Book Books have pages.", "No title.", "Car Cars drive."])
    ]
    assert rows[0]["pos_ids"] == ["11"] and rows[0]["neg_ids"] == ["14", content_id("No title."), "13"]
    assert counts.left_out == {"no positive context": 1}
    _, rows = from_json(tmp_path, "dpr", DPR, positives=2, negatives=1)
    assert triples(rows) == [("who wrote it", ["Book Ann wrote it.", "Ann Ann writes."], ["Book Books have pages."])]


def test_a_long_list_is_read_as_a_stream(tmp_path, monkeypatch):
    from nvembed_mcore.data.convert import rows

    expected = from_json(tmp_path, "dpr", DPR * 5)[1]
    for size in (1, 2, 7, 64):
        monkeypatch.setattr(rows, "_CHUNK", size)
        assert from_json(tmp_path, "dpr", DPR * 5)[1] == expected


def test_hotpotqa(tmp_path):
    lists = {
        "_id": "5a",
        "question": "Which is older?",
        "answer": "Rome",
        "supporting_facts": [["Rome", 0], ["Paris", 0], ["Rome", 1]],
        "context": [
            ["Rome", ["Rome is old.", " It has hills."]],
            ["Oslo", ["Oslo is cold."]],
            ["Paris", ["Paris is big."]],
            ["Bern", ["Bern has bears."]],
        ],
    }
    objects = {
        "id": "5a",
        "question": "Which is older?",
        "supporting_facts": {"title": ["Rome", "Paris", "Rome"], "sent_id": [0, 0, 1]},
        "context": {
            "title": [title for title, _ in lists["context"]],
            "sentences": [sentences for _, sentences in lists["context"]],
        },
    }
    for made in (from_json(tmp_path, "hotpotqa", [lists]), converted(tmp_path, "hotpotqa", [objects])):
        assert triples(made[1]) == [
            (
                "Which is older?",
                ["Rome Rome is old. It has hills.", "Paris Paris is big."],
                ["Oslo Oslo is cold.", "Bern Bern has bears."],
            )
        ]
        assert made[1][0]["query_id"] == "5a"


def test_bioasq(tmp_path):
    document = {
        "questions": [
            {"id": "b1", "body": "What is X?", "snippets": [{"text": "X is a gene."}, {"text": "X is a gene."}]},
            {"id": "b2", "body": "And Y?", "documents": ["http://a"]},
        ]
    }
    counts, rows = from_json(tmp_path, "bioasq", document)
    assert triples(rows) == [("What is X?", ["X is a gene."], [])] and rows[0]["query_id"] == "b1"
    assert counts.left_out == {"the question has no snippet": 1}
    assert converted(tmp_path, "bioasq", document["questions"])[1] == rows


@pytest.mark.parametrize("is_hugging_face", [False, True])
def test_hover(tmp_path, is_hugging_face):
    corpus = jsonl(
        tmp_path / "wiki.jsonl",
        [
            {"title": "Caf\u00e9", "text": "A caf\u00e9 sells coffee."},
            {"title": "Unused", "text": "Nothing."},
            {"title": "Tea house", "text": "It sells tea."},
        ],
    )
    claims = [
        ("c1", "Both sell drinks.", [["Cafe\u0301", 0], ["Tea_house", 1], ["Caf\u00e9", 2], ["Bar", 0]], "SUPPORTED"),
        ("c2", "It is gone.", [["Lost", 0]], "NOT_SUPPORTED"),
    ]
    items = [
        {"uid": uid, "claim": claim, "label": label}
        | {"supporting_facts": [{"key": t, "value": s} for t, s in facts] if is_hugging_face else facts}
        for uid, claim, facts, label in claims
    ]
    counts, rows = from_json(tmp_path, "hover", items, corpus=corpus)
    assert triples(rows) == [
        ("Both sell drinks.", ["Caf\u00e9 A caf\u00e9 sells coffee.", "Tea house It sells tea."], [])
    ]
    assert rows[0]["query_id"] == "c1"
    assert counts.left_out == {"none of the claim's articles is in the corpus": 1}
    assert counts.notes == {"articles that the corpus lacks": 2}
