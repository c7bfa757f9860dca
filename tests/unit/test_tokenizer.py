"""The fast tokenizer against SentencePiece itself, and the bad input of its loader."""

from __future__ import annotations

import importlib.resources
import json
import random
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nvembed_mcore.data.tokenizer import (
    TokenizerError,
    load_tokenizer,
    read_sentencepiece_vocabulary,
    tokenizer_fingerprint,
    write_mistral_tokenizer,
)

MODEL = importlib.resources.files("mistral_common") / "data" / "tokenizer.model.v1"
FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("mistral") / "tokenizer"
    write_mistral_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def reference() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=MODEL.read_bytes())


def _source_texts() -> list[str]:
    """Lines, and blocks of lines, of the standard library's own modules."""
    texts = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        texts += lines[::17]
        texts += ["\n".join(lines[i : i + 12]) for i in range(0, len(lines), 150)]
    return texts


def _random_texts() -> list[str]:
    """Texts that real files rarely have: any plane of Unicode, control characters, stacked marks, runs of blanks."""
    rng = random.Random(7)
    blanks = [" ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "a", "\u2581", "=", "==", "-", "--", "\u3000", "\u00a0"]
    ranges = [(0, 127), (0, 0x2FFF), (0x300, 0x36F), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF)]
    ranges += [(0xE000, 0x10FFFF), (0, 8), (32, 32)]
    texts = ["".join(rng.choice(blanks) for _ in range(rng.randint(0, 60))) for _ in range(2000)]
    for _ in range(3000):
        texts.append("".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 40))))
    return texts


BLANKS = ["", " ", "  ", " lead", "trail ", "\n", "\n\n\n", "\t\tx", "\r\r\n", "a" + "\n" * 100 + "b", " " * 777]
MARKS = ["\u0301", "e\u0301", "\u0301\u0301a", "\u200d", "\ufeffbom", "\x00", "a\x00b", "\u2581already", "<0x0A>"]
SCRIPTS = [
    "👩\u200d👩\u200d👧 family",
    "🇩🇪",
    "漢字とかな",
    "한국어",
    "العربية",
    "naïve café",
    "\U0010ffff",
    "x" * 3000,
]
CORNER_CASES = [*BLANKS, *MARKS, *SCRIPTS]


def test_ids_and_text_agree_with_sentencepiece(
    tokenizer: PreTrainedTokenizerFast, reference: sentencepiece.SentencePieceProcessor
) -> None:
    texts = [*CORNER_CASES, *_source_texts(), *_random_texts()]
    assert len(texts) >= 10_000
    expected = reference.encode(texts)
    actual = tokenizer(texts, add_special_tokens=False)["input_ids"]
    wrong = [text for text, left, right in zip(texts, actual, expected, strict=True) if left != right]
    assert wrong == []
    assert tokenizer.batch_decode(actual) == reference.decode(expected)


def test_special_tokens_as_published(tokenizer: PreTrainedTokenizerFast) -> None:
    # Ids of the public model for this query (beginning and end), and of `</s>` written into the text.
    ids = tokenizer("Given a question: What is it?</s>")["input_ids"]
    assert (ids[0], ids[-1]) == (1, 2) and ids.count(1) == ids.count(2) == 1
    assert tokenizer("a")["input_ids"] == [1, 264]
    assert tokenizer("a", "b")["input_ids"] == [1, 264, 1, 287]
    specials = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert specials == (0, 1, 2, 2)
    assert len(tokenizer) == 32000
    batch = tokenizer(["a", "a b c"], padding=True)
    assert list(batch) == ["input_ids", "attention_mask"]
    assert batch["input_ids"][0] == [1, 264, 2, 2] and batch["attention_mask"][0] == [1, 1, 0, 0]
    assert tokenizer.model_max_length == 10**30


def test_instruction_template_keeps_its_length_in_front_of_a_query(tokenizer: PreTrainedTokenizerFast) -> None:
    """`<s>` + instruction take as many ids in the whole text as alone: the last bare space piece of the prompt alone
    fuses with the first word of the query (facts of the public model: 18 ids here)."""
    prompt = "Instruct: Given a question, retrieve passages that answer the question\nQuery: "
    alone = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + "are judo throws allowed in wrestling?")["input_ids"]
    assert alone[:-1] == whole[: len(alone) - 1]
    assert tokenizer.convert_ids_to_tokens(alone[-1]) == "\u2581"
    assert tokenizer.convert_ids_to_tokens(whole[len(alone) - 1]) == "\u2581are"


@pytest.mark.parametrize(
    "config",
    [None, {"model_type": "mistral"}, {"model_type": "mistral", "transformers_version": "4.42.4"}],
    ids=["alone", "mistral", "mistral of transformers 4"],
)
def test_auto_tokenizer_keeps_our_behaviour(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, config: dict[str, str] | None
) -> None:
    write_mistral_tokenizer(tmp_path)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    auto = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*CORNER_CASES, "def f(x):\n        return  x", "text</s>"]
    assert auto.is_fast and auto(texts)["input_ids"] == tokenizer(texts)["input_ids"]
    assert (auto.padding_side, auto.pad_token_id) == ("right", 2)
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == tokenizer_fingerprint(tokenizer)


def test_same_bytes_each_time(tmp_path: Path, folder: Path) -> None:
    write_mistral_tokenizer(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in FILES)


def test_fingerprint_follows_behaviour_only(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    write_mistral_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) != before


def test_vocabulary_agrees_with_sentencepiece(reference: sentencepiece.SentencePieceProcessor) -> None:
    pieces = read_sentencepiece_vocabulary(MODEL.read_bytes())
    assert [piece.text for piece in pieces] == [reference.id_to_piece(i) for i in range(reference.get_piece_size())]
    assert [piece.score for piece in pieces] == [reference.get_score(i) for i in range(len(pieces))]
    assert [i for i, piece in enumerate(pieces) if piece.type == 6] == [
        i for i in range(32000) if reference.is_byte(i)
    ]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "(0 bytes): it has no pieces"),
        (b"\x0b", "(1 bytes): wire type 3 at byte 1"),
        (b"\x0a\x05ab", "(4 bytes): field 1 at byte 2 has 5 bytes, 2 are left"),
        (b"not a model", "(11 bytes): "),
        (MODEL.read_bytes()[:1000], "(1000 bytes): "),
    ],
)
def test_broken_model_file(data: bytes, reason: str) -> None:
    with pytest.raises(TokenizerError) as caught:
        read_sentencepiece_vocabulary(data)
    message = f"not a SentencePiece model {reason}"
    assert str(caught.value).startswith(message) if reason.endswith(" ") else str(caught.value) == message


def test_bad_folders(tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(TokenizerError) as caught:
            load_tokenizer(folder)
        return str(caught.value).replace(str(tmp_path), "TMP")

    hint = "no tokenizer folder at TMP/missing (`nvembed data tokenizer TMP/missing` writes one)"
    assert refusal(tmp_path / "missing") == hint
    hint = "TMP has no tokenizer.json: a fast tokenizer is needed (`nvembed data tokenizer DIR` writes Mistral's)"
    assert refusal(tmp_path) == hint
    write_mistral_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    assert refusal(tmp_path) == "the tokenizer in TMP has no eos_token (tokenizer_config.json): got null"
    (tmp_path / "tokenizer.json").write_text("{")
    assert refusal(tmp_path).startswith("cannot read the tokenizer in TMP: ")
