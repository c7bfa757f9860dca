"""A fast tokenizer without transformers: token ids as bytes, quickly, and in processes that start quickly.

Tokenizers like Mistral's know no word limits: they merge over a whole text, and the library walks each text anew. But
where no piece of the vocabulary holds a space behind another character, no merge crosses the place between a word and
the space behind it, and what happens on one side does not depend on the other. So the ids of a text are those of its
words, each with the spaces before it, and words come again and again.
"""

from __future__ import annotations

import json
import re
from array import array
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ID_BYTES = 4
_SPACE = "\u2581"
_WORD = re.compile(f"[ {_SPACE}]*[^ {_SPACE}]+|[ {_SPACE}]+")
_CROSSING = re.compile(f"[^{_SPACE}]{_SPACE}")
_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ],
}
_KEPT_WORDS = 1 << 18
_LONGEST_KEPT = 64


class BareTokenizer:
    """The part of a fast tokenizer that makes ids; it can be sent to other processes.

    Attributes:
        bos_token_id, eos_token_id: the tokens for the beginning and the end of a text.
    """

    def __init__(self, serialized: str, bos_token_id: int, eos_token_id: int, splits_special_tokens: bool) -> None:
        """
        Args:
            serialized: content of a `tokenizer.json`.
            splits_special_tokens: whether a special token that stands in a text is spelled like other text.
        """
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id
        self._arguments = (serialized, bos_token_id, eos_token_id, splits_special_tokens)
        self._backend = Tokenizer.from_str(serialized)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = splits_special_tokens
        behaviour = json.loads(serialized)
        self._words = _Words(self._backend) if _words_stand_alone(behaviour) else None
        added = [re.escape(token["content"]) for token in behaviour["added_tokens"]]
        # No text holds the empty character class.
        self._added = re.compile("|".join(added) or r"[^\s\S]")

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> BareTokenizer:
        """What a tokenizer of transformers does when it is called."""
        serialized = tokenizer.backend_tokenizer.to_str()
        return cls(serialized, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.split_special_tokens)

    def __reduce__(self) -> tuple[Any, ...]:
        return BareTokenizer, self._arguments

    def pieces(self, texts: list[str]) -> list[bytes]:
        """Token ids of each text, int32 as bytes, without special tokens around it."""
        if self._words is None:
            return backend_pieces(self._backend, texts)
        return [self._joined_words(text) for text in texts]

    def _joined_words(self, text: str) -> bytes:
        if not text or self._added.search(text):
            return backend_pieces(self._backend, [text])[0]
        return b"".join(map(self._words.__getitem__, _WORD.findall(" " + text)))


def backend_pieces(backend: Tokenizer, texts: list[str]) -> list[bytes]:
    """Token ids of each text, int32 as bytes, without special tokens, as the tokenizers library makes them."""
    return [array("i", one.ids).tobytes() for one in backend.encode_batch_fast(texts, add_special_tokens=False)]


class _Words(dict[str, bytes]):
    """Ids of words, each with the spaces before it, as they are asked for."""

    def __init__(self, backend: Tokenizer) -> None:
        self._model = backend.model

    def __missing__(self, word: str) -> bytes:
        ids = array("i", [piece.id for piece in self._model.tokenize(word.replace(" ", _SPACE))]).tobytes()
        if len(word) <= _LONGEST_KEPT:
            if len(self) >= _KEPT_WORDS:
                self.clear()
            self[word] = ids
        return ids


def _words_stand_alone(behaviour: dict[str, Any]) -> bool:
    """Whether the ids of a text are those of its words, for a tokenizer with the content of this `tokenizer.json`.

    Nothing but spaces is changed before the merges; no merge makes a piece with a space behind another character;
    every character has an id of its own or those of its bytes, so none becomes an unknown that swallows its
    neighbour.
    """
    model = behaviour["model"]
    return (
        behaviour["normalizer"] == _NORMALIZER
        and behaviour["pre_tokenizer"] is None
        and not any(token["normalized"] for token in behaviour["added_tokens"])
        and model["type"] == "BPE"
        and not model.get("dropout")
        and not model.get("continuing_subword_prefix")
        and not model.get("end_of_word_suffix")
        and not model.get("ignore_merges", False)
        and model["byte_fallback"]
        and all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256))
        and not any(map(_CROSSING.search, model["vocab"]))
    )
