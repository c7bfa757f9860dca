"""From a text and an instruction to token ids and pooled positions.

A text with an instruction is `<s> Instruct: {instruction}\\nQuery: {text} </s>`, one without is `<s> {text} </s>`.
`</s>` stays the last token of a text that is cut. The mean is taken over every position from `pooled_from` on: that
leaves out `<s>` and the instruction where there is one, and nothing where there is none (NV-Embed, section 4, and the
published model, whose queries and documents are pooled so).

The prompt ends in a space. Alone, Mistral's tokenizer makes it the piece "▁"; before a text the space belongs to the
text's first piece. So `<s>` and the prompt without its last space are as many tokens as the prompt has pieces when it
stands alone, which is how the published model counts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from nvembed_mcore.data.bare_tokenizer import ID_BYTES, BareTokenizer, backend_pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    AnyTokenizer = PreTrainedTokenizerFast | BareTokenizer


@dataclass(frozen=True, slots=True)
class EncodedTexts:
    """Token ids of several texts, one behind the other.

    Attributes:
        token_ids: int32, all texts, `<s>` and `</s>` included.
        lengths: int32 [texts], tokens of each text.
        pooled_from: first pooled position, the same in every text.
        truncated: texts that were cut.
    """

    token_ids: np.ndarray
    lengths: np.ndarray
    pooled_from: int
    truncated: int

    def __len__(self) -> int:
        return len(self.lengths)

    def split(self) -> list[np.ndarray]:
        """The token ids of each text, int32 views."""
        return np.split(self.token_ids, np.cumsum(self.lengths)[:-1]) if len(self) else []


def query_prompt(instruction: str) -> str:
    """What stands before a text: `Instruct: {instruction}\\nQuery: `, or nothing without an instruction."""
    return f"Instruct: {instruction}\nQuery: " if instruction else ""


def prompt_tokens(tokenizer: AnyTokenizer, instruction: str) -> list[int]:
    """`<s>` and the pieces of the instruction that every such text begins with; without an instruction nothing.

    Their number is `pooled_from`: the pool leaves out exactly these tokens.
    """
    prompt = query_prompt(instruction)
    if not prompt:
        return []
    (pieces,) = _pieces(tokenizer, [prompt.rstrip(" ")])
    return [tokenizer.bos_token_id, *np.frombuffer(pieces, np.int32).tolist()]


def check_room(tokenizer: AnyTokenizer, instruction: str, max_tokens: int) -> None:
    """Whether a text of one token fits between the instruction and `</s>`.

    Raises:
        ValueError: it does not; the message has both numbers.
    """
    used = max(len(prompt_tokens(tokenizer, instruction)), 1)
    if used + 2 > max_tokens:
        what = f"the instruction {instruction!r}" if instruction else "<s>"
        raise ValueError(
            f"{what} takes {used} tokens, and with one token of text and </s> more than the limit of {max_tokens}"
        )


def check_not_blank(texts: Sequence[str]) -> None:
    """Raise a `ValueError` that names the first text of nothing but spaces."""
    for number, text in enumerate(texts):
        if not text.strip():
            raise ValueError(f"text {number} of {len(texts)} is empty: {text!r}")


def encode_texts(tokenizer: AnyTokenizer, texts: Sequence[str], instruction: str, max_tokens: int) -> EncodedTexts:
    """Tokenise texts, each with the instruction's prompt in front.

    Args:
        tokenizer: a fast tokenizer with `bos_token_id` and `eos_token_id`.
        texts: any number of texts; they are taken as they are, spaces around them included.
        instruction: the task in one sentence; empty for none.
        max_tokens: longest text in tokens, prompt, `<s>` and `</s>` included.

    Raises:
        ValueError: the instruction leaves no room for a text, a text is blank, or the tokenizer joins the end of the
            prompt with the beginning of a text, so that no position separates them.
    """
    check_room(tokenizer, instruction, max_tokens)
    check_not_blank(texts)
    prefix, prompt = prompt_tokens(tokenizer, instruction), query_prompt(instruction)
    rows = _pieces(tokenizer, [prompt + text for text in texts]) if texts else []
    begins_with = _as_bytes(prefix[1:])
    for number, row in enumerate(rows):
        if not row.startswith(begins_with):
            raise ValueError(f"the tokenizer does not keep {prompt!r} apart from the text {texts[number]!r}")
    sizes = np.fromiter(map(len, rows), np.int64, len(rows)) // ID_BYTES
    begin, end = _as_bytes([tokenizer.bos_token_id]), _as_bytes([tokenizer.eos_token_id])
    room = (max_tokens - 2) * ID_BYTES
    # A bytearray, so that numpy may write to it.
    joined = bytearray().join([part for row in rows for part in (begin, row[:room], end)])
    return EncodedTexts(
        token_ids=np.frombuffer(joined, np.int32),
        lengths=np.minimum(sizes + 2, max_tokens).astype(np.int32),
        pooled_from=len(prefix),
        truncated=int((sizes > max_tokens - 2).sum()),
    )


def _as_bytes(ids: list[int]) -> bytes:
    return np.array(ids, np.int32).tobytes()


def _pieces(tokenizer: AnyTokenizer, texts: list[str]) -> list[bytes]:
    """Token ids of each text, int32 as bytes, without special tokens around it."""
    if isinstance(tokenizer, BareTokenizer):
        return tokenizer.pieces(texts)
    backend = tokenizer.backend_tokenizer
    # What an earlier call of transformers may have left there.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend_pieces(backend, texts)
