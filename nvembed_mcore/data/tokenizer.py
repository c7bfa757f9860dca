"""Mistral's tokenizer as a Hugging Face fast tokenizer, made from the SentencePiece file that `mistral-common` ships.

The fast tokenizer is put together here, piece by piece, and not by the automatic conversion of transformers: version 5
of that library splits runs of spaces before the merges and then disagrees with SentencePiece. Neither `sentencepiece`
nor `protobuf` is needed: of the model file only the vocabulary is read, and that is three protobuf fields.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MODEL_FILE = "tokenizer.model.v1"
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
SPACE = "\u2581"  # what SentencePiece writes for a space


class TokenizerError(ValueError):
    """A tokenizer folder or file cannot be used; the message names it."""


@dataclass(frozen=True)
class Piece:
    """One row of a SentencePiece vocabulary: its text, its score (a merge happens earlier the higher it is) and its
    type in `sentencepiece_model.proto` (1 normal, 2 unknown, 3 control, 4 user defined, 5 unused, 6 byte)."""

    text: str
    score: float
    type: int


NORMAL, CONTROL = 1, 3


def write_mistral_tokenizer(directory: str | Path) -> None:
    """Write the tokenizer of Mistral-7B-v0.1 into `directory` (made when missing) as a Hugging Face fast tokenizer.

    The files are `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`; each call writes the same
    bytes. `AutoTokenizer` of transformers 4.42 to 5.x loads them. Behaviour as published with that model: every text
    gets a leading space, spaces are ordinary symbols, characters without a piece fall back to bytes, `<s>` in front,
    no `</s>` behind, `</s>` pads on the right.

    Raises:
        TokenizerError: `mistral-common` ships no such model file, or the file is not a SentencePiece model.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    pieces = read_sentencepiece_vocabulary(_mistral_model_bytes())
    # Each merge as one string: tokenizers 0.19 (transformers 4.42) knows no other form, later ones read both.
    _write_json(directory / "tokenizer.json", _tokenizer_json(pieces), indent=None)
    _write_json(directory / "tokenizer_config.json", _tokenizer_config(), indent=2)
    _write_json(directory / "special_tokens_map.json", _special_tokens(), indent=2)


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a folder, exactly as its `tokenizer.json` says; nothing is looked up on a network.

    Raises:
        TokenizerError: the folder or its `tokenizer.json` is missing or unreadable, or the tokenizer lacks a token for
            the beginning or the end of a text.
    """
    from transformers import PreTrainedTokenizerFast

    directory = Path(directory)
    if not directory.is_dir():
        raise TokenizerError(f"no tokenizer folder at {directory} (`nvembed data tokenizer {directory}` writes one)")
    if not (directory / "tokenizer.json").is_file():
        raise TokenizerError(
            f"{directory} has no tokenizer.json: a fast tokenizer is needed "
            f"(`nvembed data tokenizer DIR` writes Mistral's)"
        )
    try:
        # Not AutoTokenizer: beside a config.json it may choose a class that rebuilds the normaliser. The flag says
        # that the regular expression of Mistral's byte-level tokenizers is no concern here; unset, it warns.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True, fix_mistral_regex=False)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise TokenizerError(f"cannot read the tokenizer in {directory}: {error}") from error
    for name in ("bos_token", "eos_token"):
        if getattr(tokenizer, name) is None:
            raise TokenizerError(f"the tokenizer in {directory} has no {name} (tokenizer_config.json): got null")
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 (64 hex digits) of all that decides which ids a text gets: the serialised tokenizer and its special
    tokens. Padding and truncation do not count: transformers sets them anew in each call."""
    behaviour = json.loads(tokenizer.backend_tokenizer.to_str())
    behaviour.pop("truncation", None)
    behaviour.pop("padding", None)
    behaviour["special"] = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    if (
        tokenizer.split_special_tokens
    ):  # `</s>` written in a text is spelled out; the serialised form says nothing of it
        behaviour["split_special_tokens"] = True
    return hashlib.sha256(json.dumps(behaviour, sort_keys=True).encode()).hexdigest()


def read_sentencepiece_vocabulary(model: bytes) -> list[Piece]:
    """The vocabulary of a serialised SentencePiece `ModelProto`, in id order.

    Raises:
        TokenizerError: the bytes are no such model.
    """
    try:
        pieces = []
        for field, value in _protobuf_fields(model):
            if field == 1:  # ModelProto.pieces
                row: dict[int, Any] = dict(_protobuf_fields(value))
                pieces.append(Piece(row[1].decode("utf-8"), row.get(2, 0.0), row.get(3, NORMAL)))
    except (IndexError, KeyError, AttributeError, TypeError, struct.error, ValueError) as error:
        raise TokenizerError(f"not a SentencePiece model ({len(model)} bytes): {error}") from error
    if not pieces:
        raise TokenizerError(f"not a SentencePiece model ({len(model)} bytes): it has no pieces")
    return pieces


def _protobuf_fields(message: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """(field number, value) of one protobuf message; 32-bit values are read as floats."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        field, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(message, position)
            yield field, value
            continue
        if wire_type == 2:
            size, position = _varint(message, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        chunk = message[position : position + size]
        if len(chunk) != size:
            raise ValueError(f"field {field} at byte {position} has {size} bytes, {len(chunk)} are left")
        position += size
        yield field, struct.unpack("<f", chunk)[0] if wire_type == 5 else chunk


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """The variable-length integer at `position`, and the position behind it."""
    value = shift = 0
    while True:
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position


def _merges(pieces: list[Piece]) -> list[str]:
    """The byte-pair merges that give SentencePiece's segmentation: every way to join two pieces to a third.

    SentencePiece joins the neighbours whose union has the highest score. A piece that can be made in several ways has
    one score; of its ways the longer left half goes first, as in the published conversion.
    """
    normal = {piece.text: piece.score for piece in pieces if piece.type == NORMAL}
    merges = [
        (score, cut, len(text) - cut, f"{text[:cut]} {text[cut:]}")
        for text, score in normal.items()
        for cut in range(1, len(text))
        if text[:cut] in normal and text[cut:] in normal
    ]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3] for merge in merges]


def _tokenizer_json(pieces: list[Piece]) -> dict[str, Any]:
    """The content of `tokenizer.json` (format 1.0 of the tokenizers library)."""
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[token], **_added_token(token)} for token in (UNKNOWN, BEGIN, END)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(BEGIN, 0), _sequence("A", 0)],
            "pair": [_special(BEGIN, 0), _sequence("A", 0), _special(BEGIN, 1), _sequence("B", 1)],
            "special_tokens": {BEGIN: {"id": BEGIN, "ids": [ids[BEGIN]], "tokens": [BEGIN]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": UNKNOWN,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": _merges(pieces),
        },
    }


def _special(token: str, type_id: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": type_id}}


def _sequence(name: str, type_id: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": type_id}}


def _added_token(token: str) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": token, **flags}


def _special_tokens() -> dict[str, str]:
    return {"bos_token": BEGIN, "eos_token": END, "pad_token": END, "unk_token": UNKNOWN}


def _tokenizer_config() -> dict[str, Any]:
    """The content of `tokenizer_config.json`. `PreTrainedTokenizerFast` takes `tokenizer.json` as it is in every
    version of transformers; `LlamaTokenizerFast` of version 5 builds its own normaliser."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): _added_token(token) for i, token in enumerate((UNKNOWN, BEGIN, END))},
        "additional_special_tokens": [],
        **_special_tokens(),
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 10**30,
        "padding_side": "right",
        "spaces_between_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "use_default_system_prompt": False,
    }


def _mistral_model_bytes() -> bytes:
    resource = importlib.resources.files("mistral_common") / "data" / MODEL_FILE
    try:
        return resource.read_bytes()
    except FileNotFoundError as error:
        raise TokenizerError(f"mistral-common ships no {MODEL_FILE}: looked at {resource}") from error


def _write_json(path: Path, content: dict[str, Any], indent: int | None) -> None:
    """Write aside and rename, so that a reader never sees half a file."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    separators = (",", ":") if indent is None else None
    text = json.dumps(content, ensure_ascii=False, indent=indent, separators=separators)
    aside.write_text(text + "\n", encoding="utf-8")
    os.replace(aside, path)
