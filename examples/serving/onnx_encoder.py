"""Embed texts with an ONNX export: onnxruntime, tokenizers and numpy, without torch.

nvembed export-onnx runs/quickstart/export runs/quickstart/onnx
python examples/serving/onnx_encoder.py runs/quickstart/onnx "read a file line by line"
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


class OnnxEncoder:
    """An ONNX export as a function from texts to unit vectors.

    Args:
        folder: written by `nvembed export-onnx`.
        providers: onnxruntime's, the first that is there: `CUDAExecutionProvider`, `CPUExecutionProvider`, ...
    """

    def __init__(self, folder: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        folder = Path(folder)
        self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=list(providers))
        self.prompts = json.loads((folder / "config_sentence_transformers.json").read_text("utf-8"))["prompts"]
        self.limit = json.loads((folder / "sentence_bert_config.json").read_text("utf-8"))["max_seq_length"]
        # It puts <s> in front and </s> behind, and a text that is cut keeps its </s>.
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()

    def encode(self, texts: Sequence[str], prompt_name: str = "document", batch_size: int = 32) -> np.ndarray:
        """Unit vectors, float32 [len(texts), D]; `prompt_name` is `query` or `document`."""
        prompt = self.prompts[prompt_name]
        prefix = self._prefix(prompt)
        self.tokenizer.enable_truncation(self.limit)
        rows = [encoding.ids for encoding in self.tokenizer.encode_batch([prompt + text for text in texts])]
        longest_first = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        vectors: list[np.ndarray | None] = [None] * len(rows)
        for start in range(0, len(rows), batch_size):
            chosen = longest_first[start : start + batch_size]
            for row, vector in zip(chosen, self._embed([rows[row] for row in chosen], prefix), strict=True):
                vectors[row] = vector
        return np.stack(vectors)

    def _prefix(self, prompt: str) -> int:
        """Positions in front that are not pooled: `<s>` and the prompt's pieces; 0 without a prompt."""
        self.tokenizer.no_truncation()
        # A space at the end becomes part of the text's first piece.
        prefix = len(self.tokenizer.encode(prompt.rstrip(" ")).ids) - 1 if prompt else 0
        if prefix + 2 > self.limit:
            raise ValueError(f"the prompt takes {prefix} of {self.limit} tokens and leaves no room for text and </s>")
        return prefix

    def _embed(self, rows: list[list[int]], prefix: int) -> np.ndarray:
        length = max(map(len, rows))
        ids = np.array([row + [0] * (length - len(row)) for row in rows], dtype=np.int64)
        position = np.arange(length)
        mask = (position < np.array([len(row) for row in rows])[:, None]).astype(np.int64)
        inputs = {"input_ids": ids, "attention_mask": mask, "pool_mask": mask * (position >= prefix)}
        return self.session.run(["sentence_embedding"], inputs)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="written by `nvembed export-onnx`")
    parser.add_argument("query")
    parser.add_argument("documents", nargs="*", default=["def lines(path): ...", "class Parser: ..."])
    arguments = parser.parse_args()
    encoder = OnnxEncoder(arguments.folder)
    scores = encoder.encode([arguments.query], "query") @ encoder.encode(arguments.documents).T
    for score, document in sorted(zip(scores[0], arguments.documents, strict=True), reverse=True):
        print(f"{score:.3f}  {document}")


if __name__ == "__main__":
    main()
