"""Runs inside an environment of `compat_matrix`: embeds texts with the libraries there and compares.

    python probe.py JOB.json RESULT.json

Needs no module of this project. JOB is a list of exports: `folder`, `format`, `texts`, `limit`, `prompts` (by the way
they are given: `documents`, `prompt_name`, `prompt`) and `expected`, embeddings by dtype and way. RESULT has, for each
export, a cell (`float32 sdpa`, ...) -> smallest cosine, or a sentence that says what happened instead.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer

DTYPES, IMPLEMENTATIONS = ("float32", "bfloat16", "float16"), ("sdpa", "eager")
FLASH = "flash_attention_2"
CAUSAL, NOT_RUN = "not supported (causal)", "not run"
Embeddings = dict[str, torch.Tensor]


def smallest_cosine(found: Embeddings, expected: dict[str, Any], rows: list[int] | None = None) -> float:
    """Over all texts (or those of `rows`) in all ways; a vector that is not finite counts as -1."""
    worst = 1.0
    for way, vectors in found.items():
        wanted = torch.tensor(expected[way], dtype=torch.float64)
        cosines = F.cosine_similarity(vectors.double(), wanted if rows is None else wanted[rows], dim=-1)
        worst = min(worst, cosines.nan_to_num(-1.0).min().item())
    return worst


def load(export: dict[str, Any], dtype: str, implementation: str) -> Any:
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    settings = {"dtype" if version >= (4, 56) else "torch_dtype": getattr(torch, dtype)}
    if export["format"] != "mean":
        settings["trust_remote_code"] = True
    model = AutoModel.from_pretrained(export["folder"], attn_implementation=implementation, **settings).eval()
    types = {parameter.dtype for parameter in model.parameters()}
    if types != {getattr(torch, dtype)}:
        raise RuntimeError(f"asked for {dtype}, got {types}")
    backbone = getattr(model, "embedding_model", model)
    if backbone.config._attn_implementation != implementation:
        raise RuntimeError(f"asked for {implementation}, got {backbone.config._attn_implementation}")
    return model


@torch.no_grad()
def embed(model: Any, export: dict[str, Any]) -> Embeddings:
    """By the model's own `encode`; the format `mean` is pooled as its card shows."""
    texts, limit = export["texts"], export["limit"]
    if export["format"] != "mean":
        return {
            way: model.encode(texts, instruction=prompt, max_length=limit, batch_size=4)
            for way, prompt in export["prompts"].items()
        }
    tokenizer = AutoTokenizer.from_pretrained(export["folder"])
    result = {}
    for way, prompt in export["prompts"].items():
        inputs = tokenizer(
            [prompt + text for text in texts], padding=True, truncation=True, max_length=limit, return_tensors="pt"
        )
        pooled = inputs["attention_mask"].clone()
        if prompt:
            pooled[:, : len(tokenizer(prompt)["input_ids"]) - 1] = 0
        states = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
        result[way] = F.normalize((states.float() * pooled[..., None]).sum(1), dim=-1)
    return result


@torch.no_grad()
def is_causal(model: Any) -> bool:
    """Whether the first state stays the same when the last token changes."""
    ids = torch.arange(100, 108)[None]
    changed = ids.clone()
    changed[0, -1] = 500
    first, second = (model(input_ids=x, attention_mask=torch.ones_like(x))[0][0, 0] for x in (ids, changed))
    return bool((first - second).abs().max() < 1e-6)


def flash_stand_in(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **settings):
    """What flash attention computes, in torch: `query`, `key`, `value` [N, heads, L, w], the mask [N, L] or none, and
    causality from `is_causal` as transformers' own function takes it."""
    causal = settings.get("is_causal")
    causal = module.is_causal if causal is None else causal
    groups = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    length = query.size(2)
    seen = torch.ones(length, length, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    if attention_mask is not None:
        assert attention_mask.dim() == 2, "flash attention takes no other mask"
        seen = seen & attention_mask[:, None, None, :].bool()
    return F.scaled_dot_product_attention(query, key, value, seen, scale=scaling).transpose(1, 2), None


def with_flash(model: Any) -> Any:
    """The loaded model with the stand-in in place of flash attention, which needs a GPU."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS[FLASH] = flash_stand_in
    backbone = getattr(model, "embedding_model", model)
    backbone.config._attn_implementation = FLASH
    return model


def with_transformers(export: dict[str, Any]) -> dict[str, float | str]:
    cells: dict[str, float | str] = {}
    for dtype in DTYPES:
        for implementation in IMPLEMENTATIONS:
            model = load(export, dtype, implementation)
            cosine = smallest_cosine(embed(model, export), export["expected"][dtype])
            is_deaf = export["format"] == "mean" and not export["causal"] and is_causal(model)
            cells[f"{dtype} {implementation}"] = CAUSAL if is_deaf else cosine
    name = "float32 flash (stand-in)"
    if not hasattr(transformers.modeling_utils, "ALL_ATTENTION_FUNCTIONS"):
        cells[name] = NOT_RUN
        return cells
    model = with_flash(load(export, "float32", "sdpa"))
    cosine = smallest_cosine(embed(model, export), export["expected"]["float32"])
    is_deaf = export["format"] == "mean" and not export["causal"] and is_causal(model)
    cells[name] = CAUSAL if is_deaf else cosine
    return cells


def with_sentence_transformers(export: dict[str, Any]) -> dict[str, float | str]:
    settings = {} if export["format"] == "mean" else {"trust_remote_code": True}
    model = SentenceTransformer(export["folder"], device="cpu", **settings)
    is_deaf = export["format"] == "mean" and not export["causal"] and is_causal(model[0].auto_model)
    # Before version 6 it strips white space around a text, so those texts are other texts there.
    rows = [i for i, text in enumerate(export["texts"]) if text == text.strip()]
    texts = [export["texts"][i] for i in rows]
    cells: dict[str, float | str] = {}
    for way, prompt in export["prompts"].items():
        how = {"documents": {}, "prompt_name": {"prompt_name": "query"}, "prompt": {"prompt": prompt}}[way]
        vectors = torch.as_tensor(model.encode(texts, batch_size=4, **how))
        cosine = smallest_cosine({way: vectors}, export["expected"]["float32"], rows)
        cells[f"sentence-transformers, {way}"] = CAUSAL if is_deaf else cosine
    return cells


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    result: dict[str, dict[str, float | str]] = {}
    for export in job:
        cells = result[export["name"]] = {}
        for measure in (with_transformers, with_sentence_transformers):
            try:
                cells |= measure(export)
            except Exception as error:  # whatever a library raises is a result of this cell
                traceback.print_exc()
                cells[measure.__name__.replace("_", " ")] = f"failed: {type(error).__name__}: {error}"
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
