"""Prompts and pooled positions with Mistral's own tokenizer, against the arithmetic of the published model."""

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nvembed_mcore.data.prompts import encode_texts, prompt_tokens, query_prompt
from nvembed_mcore.data.tokenizer import load_tokenizer, write_mistral_tokenizer

INSTRUCTION = "Given a question, retrieve passages that answer the question"
QUERIES = ["who wrote it", "x", "  two spaces", "\nnew line", "中文", "é", "\u0301mark", "trailing ", "a</s>b", "😀"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_mistral_tokenizer(folder)
    return load_tokenizer(folder)


def pieces(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_prompt_is_byte_exact():
    assert query_prompt("Find it") == "Instruct: Find it\nQuery: "
    assert query_prompt("") == ""


@pytest.mark.parametrize("instruction", [INSTRUCTION, "x", "Classify: is it good?  ", "検索", "end with newline\n"])
def test_exactly_begin_and_instruction_are_left_out(tokenizer, instruction):
    encoded = encode_texts(tokenizer, QUERIES, instruction, 512)
    prompt = query_prompt(instruction)
    assert encoded.pooled_from == len(pieces(tokenizer, prompt)), "the published count: the prompt's pieces alone"
    for query, row in zip(QUERIES, encoded.split(), strict=True):
        assert row.tolist() == [1, *pieces(tokenizer, prompt + query), 2]
        assert row.tolist() == tokenizer(prompt + query + "</s>")["input_ids"], "what the published model feeds"
        assert tokenizer.decode(row[1 : encoded.pooled_from]) == prompt.rstrip(" ")
        pooled = tokenizer.convert_ids_to_tokens(row[encoded.pooled_from :])
        assert pooled[0].startswith("▁") and pooled[-1] == "</s>"
    assert encoded.truncated == 0


def test_the_first_word_is_pooled_with_its_space(tokenizer):
    encoded = encode_texts(tokenizer, ["where is it"], INSTRUCTION, 512)
    assert encoded.pooled_from == 18
    assert tokenizer.convert_ids_to_tokens(encoded.token_ids[18:]) == ["▁where", "▁is", "▁it", "</s>"]


def test_without_instruction_all_is_pooled(tokenizer):
    encoded = encode_texts(tokenizer, QUERIES, "", 512)
    assert encoded.pooled_from == 0 and prompt_tokens(tokenizer, "") == []
    for query, row in zip(QUERIES, encoded.split(), strict=True):
        assert row.tolist() == [1, *pieces(tokenizer, query), 2]


def test_types_and_empty_batch(tokenizer):
    encoded = encode_texts(tokenizer, QUERIES, "", 512)
    assert encoded.token_ids.dtype == encoded.lengths.dtype == np.int32
    assert len(encoded) == len(QUERIES) == len(encoded.split()) and encoded.lengths.sum() == len(encoded.token_ids)
    assert [len(row) for row in encoded.split()] == encoded.lengths.tolist()
    nothing = encode_texts(tokenizer, [], INSTRUCTION, 512)
    assert len(nothing) == len(nothing.token_ids) == len(nothing.split()) == 0 and nothing.pooled_from == 18


def test_truncation_keeps_the_end_token(tokenizer):
    words = "one two three four five six seven eight"
    full = encode_texts(tokenizer, [words], "", 512).split()[0].tolist()
    for limit in range(3, len(full) + 2):
        encoded = encode_texts(tokenizer, [words, "one"], "", limit)
        cut = encoded.split()[0].tolist()
        assert cut == (full if limit >= len(full) else [*full[: limit - 1], 2])
        assert encoded.truncated == (limit < len(full))
        assert encoded.split()[1].tolist() == [1, full[1], 2]
    cut = encode_texts(tokenizer, [words], INSTRUCTION, 20)
    assert tokenizer.convert_ids_to_tokens(cut.token_ids[cut.pooled_from :]) == ["▁one", "</s>"]


def test_an_instruction_without_room(tokenizer):
    assert len(encode_texts(tokenizer, ["x"], INSTRUCTION, 20)) == 1
    with pytest.raises(ValueError, match=r"takes 18 tokens, and .* more than the limit of 19"):
        encode_texts(tokenizer, ["x"], INSTRUCTION, 19)
    with pytest.raises(ValueError, match=r"<s> takes 1 tokens.* limit of 2"):
        encode_texts(tokenizer, ["x"], "", 2)


@pytest.mark.parametrize("blank", ["", " ", "\n\t"])
def test_a_blank_text(tokenizer, blank):
    with pytest.raises(ValueError, match="text 1 of 2 is empty"):
        encode_texts(tokenizer, ["fine", blank], INSTRUCTION, 64)


def test_a_tokenizer_that_joins_prompt_and_text():
    """Whole strings between spaces as tokens, but the prompt's colon and the text in one: no position divides them."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, "Instruct: a\nQuery:": 3, "Instruct: a\nQuery: b": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106
    joining = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")  # noqa: S106
    with pytest.raises(ValueError, match="does not keep 'Instruct: a"):
        encode_texts(joining, ["b"], "a", 16)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    apart = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")  # noqa: S106
    assert encode_texts(apart, ["b"], "a", 16).pooled_from == 6
