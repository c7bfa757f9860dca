"""Write an export as an ONNX graph, for servers without torch.

One graph from token ids to unit vectors, pooling head and instruction mask included, for any number of texts of any
length. The cross attention on latents, which no text changes, is folded into two constant matrices.

Letters: `N` texts, `L` tokens of the longest, `D` embedding size.
"""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from nvembed_mcore.checkpoint.hf_export import DTYPES, ExportError, written_aside
from nvembed_mcore.checkpoint.hf_load import exported_prompt, load_exported

if TYPE_CHECKING:
    from nvembed_mcore.checkpoint.hf_files.modeling_nvembed import NVEmbedModel

log = logging.getLogger(__name__)

GRAPH_FILE = "model.onnx"
INPUTS = ("input_ids", "attention_mask", "pool_mask")
OUTPUT = "sentence_embedding"
BESIDE = (
    *("config.json", "config_sentence_transformers.json", "sentence_bert_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
)
"""Files of the export that go along: tokenizer, prompts, limit."""
LEAST_COSINE = {"float32": 0.9999, "float16": 0.999}
"""What each checked text must reach between onnxruntime and torch, both in the graph's data type."""
CHECKED = ("a", "how do I read a file line by line", "def lines(path):\n    return open(path)\n", "a long text, " * 40)
MOST_CHECKED = 512
"""Tokens of a checked text at most."""


@dataclass(frozen=True)
class OnnxExport:
    """What was written. `cosine`: the smallest between onnxruntime and torch over the checked texts."""

    num_bytes: int
    cosine: float


class _Graph(nn.Module):
    """`NVEmbedModel` from masks to vectors alone."""

    def __init__(self, model: NVEmbedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pool_mask: Tensor) -> Tensor:
        """int64 [N, L] each; float32 [N, D]."""
        return self.model(input_ids, attention_mask, pool_mask).sentence_embeddings


@torch.no_grad()
def export_onnx(source: str | os.PathLike, output_dir: str | os.PathLike, *, dtype: str = "float32") -> OnnxExport:
    """Write the folder `output_dir`: `model.onnx` with its weights beside it, tokenizer, prompts and limit.

    The graph takes `input_ids`, `attention_mask` and `pool_mask`, int64 [N, L] padded on the right, and gives
    `sentence_embedding`, float32 [N, D] of unit length. `pool_mask` is `attention_mask` without `<s>` and the tokens
    of the instruction where a text has one. onnxruntime then embeds a few texts, and must say what torch says.

    Args:
        source: exported folder, of either format.
        output_dir: must not exist.
        dtype: `float32` or `float16`, of the weights and the arithmetic.

    Raises:
        ExportError: `output_dir` exists, `dtype` is none of the two, onnx or onnxruntime is not installed, or their
            vectors differ from torch's.
        ConfigError, WeightsError: `source` cannot be loaded (`hf_load.load_exported`).
    """
    source, output_dir = Path(source), Path(output_dir)
    if dtype not in LEAST_COSINE:
        raise ExportError(f"dtype must be one of {', '.join(LEAST_COSINE)} for ONNX, got {dtype!r}")
    _require_packages()
    with written_aside(output_dir) as aside:
        graph = _Graph(load_exported(source).to(DTYPES[dtype])).eval()
        inputs = [
            _inputs(graph.model, list(CHECKED), prompt) for prompt in dict.fromkeys(("", exported_prompt(source)))
        ]
        expected = [graph(*one) for one in inputs]  # also makes the folded matrices, which the graph holds
        _write_graph(graph, inputs[0], aside / GRAPH_FILE)
        del graph  # a second copy of the weights comes with onnxruntime
        cosine = _smallest_cosine(aside / GRAPH_FILE, inputs, expected)
        if not cosine >= LEAST_COSINE[dtype]:
            raise ExportError(f"onnxruntime and torch differ on {source}: cosine {cosine} < {LEAST_COSINE[dtype]}")
        for name in BESIDE:
            if (source / name).exists():
                shutil.copyfile(source / name, aside / name)
        num_bytes = sum(file.stat().st_size for file in aside.glob(f"{GRAPH_FILE}*"))
    return OnnxExport(num_bytes, cosine)


def _require_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(f"ONNX needs the extra `serve` (pip install 'nvembed_mcore[serve]'): {error}") from error


def _inputs(model: NVEmbedModel, texts: list[str], prompt: str) -> tuple[Tensor, Tensor, Tensor]:
    """`INPUTS` of some texts, int64 [N, L] each."""
    tokenizer = model.tokenizer
    texts = [prompt + text for text in texts]
    limit = {"truncation": True, "max_length": min(tokenizer.model_max_length, MOST_CHECKED)}
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", **limit)
    mask = encoded["attention_mask"]
    pooled = mask.clone()
    # A space at the end of the prompt becomes part of the text's first piece, so it must not be counted.
    pooled[:, : len(tokenizer(prompt.rstrip(" "))["input_ids"]) - 1 if prompt else 0] = 0
    return encoded["input_ids"], mask, pooled


def _write_graph(graph: _Graph, example: tuple[Tensor, ...], file: Path) -> None:
    sizes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    with _quiet_exporter():
        program = torch.onnx.export(
            graph,
            example,
            dynamo=True,
            verbose=False,
            input_names=list(INPUTS),
            output_names=[OUTPUT],
            dynamic_shapes=(sizes, sizes, sizes),
        )
        program.save(str(file), external_data=True)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter tells of torchvision, which nobody needs here, and of its own passes."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _smallest_cosine(file: Path, inputs: list[tuple[Tensor, ...]], expected: list[Tensor]) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    cosines = []
    for values, vectors in zip(inputs, expected, strict=True):
        feed = {name: value.numpy() for name, value in zip(INPUTS, values, strict=True)}
        (found,) = session.run([OUTPUT], feed)
        cosines.append((found.astype(np.float64) * vectors.double().numpy()).sum(-1))
    return float(np.concatenate(cosines).min())
