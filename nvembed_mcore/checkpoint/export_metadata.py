"""What an export holds besides weights and code: configuration, tokenizer, sentence-transformers metadata, model card.

Every function returns the content of files; nothing is written here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import MistralConfig

from nvembed_mcore import redact
from nvembed_mcore.checkpoint.hf_folder import read_json
from nvembed_mcore.config import PoolingConfig
from nvembed_mcore.data.prompts import query_prompt
from nvembed_mcore.model.mistral import head_dim

PROMPT_END_PATTERN = r"(?<=\nQuery:) \z"
"""The space at the end of a prompt that stands alone. See `tokenizer_files`."""


SENTENCE_MODULE = "sentence_nvembed.NVEmbedTransformer"
"""The one module of `modules.json` that is ours, in a file of its own."""

MEAN_SINCE = "5.2.0"
"""The first transformers whose `MistralModel` obeys `is_causal: false`; the first sentence-transformers that can be
installed with it has the same number (docs/compatibility.md)."""


def mistral_config(hf_config: MistralConfig) -> dict[str, Any]:
    """The backbone's keys, read by transformers 4.42 to 5.x.

    The rotary base stands there in the form of version 4 (`rope_theta`) and of version 5 (`rope_parameters`).
    """
    copied = (
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "hidden_act max_position_embeddings initializer_range rms_norm_eps attention_dropout bos_token_id eos_token_id"
    ).split()
    theta = hf_config.rope_parameters["rope_theta"]
    return {
        "architectures": ["MistralModel"],
        "model_type": "mistral",
        **{name: getattr(hf_config, name) for name in copied},
        "head_dim": head_dim(hf_config),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "pad_token_id": None,
        "sliding_window": None,  # published too, and not applied: a bidirectional model attends to the whole text
        "tie_word_embeddings": False,
        "use_cache": False,
    }


def mean_config(hf_config: MistralConfig, *, is_causal: bool, dtype: str) -> dict[str, Any]:
    """`config.json` of a plain `MistralModel`."""
    return {**mistral_config(hf_config), "is_causal": is_causal, "torch_dtype": dtype}


def nv_embed_config(
    hf_config: MistralConfig, pooling: PoolingConfig, *, is_causal: bool, dtype: str, instruction: str
) -> dict[str, Any]:
    """`config.json` with the published NV-Embed's keys.

    The published code loads a tokenizer from `text_config._name_or_path`. A folder does not know where it will lie, so
    it says `.`: run that code inside the folder, or write the folder's path there. Ours does not read it. A causal
    model's backbone is not called `bidir_mistral`, because that code would run it without its mask.
    """
    hidden = hf_config.hidden_size
    text_config = {"_name_or_path": ".", **mistral_config(hf_config)}
    if not is_causal:
        text_config["model_type"] = "bidir_mistral"
    latent_attention_config = {
        "model_type": "latent_attention",
        "num_latents_value": pooling.num_latents,
        "num_cross_heads": pooling.num_heads,
        "hidden_dim": hidden,
        "latent_dim": hidden,
        "cross_dim_head": pooling.head_width or hidden,
        "output_normalize": True,
    }
    return {
        "architectures": ["NVEmbedModel"],
        "auto_map": {"AutoConfig": "modeling_nvembed.NVEmbedConfig", "AutoModel": "modeling_nvembed.NVEmbedModel"},
        "model_type": "nvembed",
        "pooling": pooling.kind,
        "is_causal": is_causal,
        "query_prompt": query_prompt(instruction),
        "hidden_size": hidden,
        "text_config": text_config,
        "latent_attention_config": latent_attention_config,
        "padding_side": "right",
        "add_pad_token": True,
        "add_eos": True,
        "is_mask_instruction": True,
        "mask_type": "b",
        "torch_dtype": dtype,
    }


def tokenizer_files(tokenizer_dir: Path, max_tokens: int) -> dict[str, dict[str, Any]]:
    """The tokenizer's files, changed so that every library that loads them feeds the model what it was trained on.

    - `<s>` in front and `</s>` behind come from the tokenizer itself, so `</s>` survives truncation.
    - A query's prompt that is tokenised alone loses its last space: in front of a text the space is part of the
      text's first piece, alone it would be a piece of its own. sentence-transformers counts a prompt's tokens by
      tokenising it alone (and versions before 6 strip it): so the count is exact everywhere. No text is changed but
      one that ends in the words of the prompt.

    A tokenizer that comes from an export stays as it is.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: a file is missing, unreadable or malformed, or lacks a special
            token.
    """
    backend, settings = (read_json(tokenizer_dir / name) for name in ("tokenizer.json", "tokenizer_config.json"))
    begin, end = (_content(settings[name]) for name in ("bos_token", "eos_token"))
    ids = {token["content"]: token["id"] for token in backend["added_tokens"]}

    drop_space = {"type": "Replace", "pattern": {"Regex": PROMPT_END_PATTERN}, "content": ""}
    before = backend.get("normalizer") or {}
    if before.get("normalizers", [None])[:1] != [drop_space]:
        normalizers = [drop_space, before] if before else [drop_space]
        backend["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    sides = [
        [_special(begin, i), {"Sequence": {"id": name, "type_id": i}}, _special(end, i)] for i, name in enumerate("AB")
    ]
    backend["post_processor"] = {
        "type": "TemplateProcessing",
        "single": sides[0],
        "pair": sides[0] + sides[1],
        "special_tokens": {token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (begin, end)},
    }
    backend["truncation"] = backend["padding"] = None
    settings |= {
        # Takes tokenizer.json as it is, in every version; Llama's class of version 5 builds its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": True,
        "pad_token": _content(settings.get("pad_token") or end),
        "padding_side": "right",
        "model_max_length": max_tokens,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    settings.pop("auto_map", None)
    special = {
        name: settings[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token") if name in settings
    }
    settings = redact.tree(settings)
    return {"tokenizer.json": backend, "tokenizer_config.json": settings, "special_tokens_map.json": special}


def _content(token: str | dict[str, Any]) -> str:
    """A special token's text; configurations hold it bare or with its flags."""
    text = token["content"] if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise ValueError(f"tokenizer_config.json: a special token is {token!r}")
    return text


def _special(token: str, type_id: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": token, "type_id": type_id}}


def sentence_transformers_files(
    hidden: int, pooling: PoolingConfig, max_tokens: int, instruction: str, *, is_mean: bool
) -> dict[str, Any]:
    """Metadata in the form that versions 3 to 6 read. It names only modules of that library, but for `multi_layer`
    pooling, which no module of that library can do.

    Args:
        is_mean: for a plain `MistralModel`; versions that cannot run it then warn.
    """
    settings: dict[str, Any] = {
        "prompts": {"query": query_prompt(instruction), "document": ""},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    if is_mean:
        settings["__version__"] = {"sentence_transformers": MEAN_SINCE, "transformers": MEAN_SINCE}
    files = {
        "sentence_bert_config.json": {"max_seq_length": max_tokens, "do_lower_case": False},
        "config_sentence_transformers.json": settings,
    }
    if pooling.kind == "multi_layer":
        return {**files, "modules.json": [{"idx": 0, "name": "0", "path": "", "type": SENTENCE_MODULE}]}
    modes = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")
    chosen = "lasttoken" if pooling.kind == "last" else "mean_tokens"
    classes = (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
    return {
        **files,
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (path, name) in enumerate(classes)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": hidden,
            **{f"pooling_mode_{mode}": mode == chosen for mode in modes},
            "include_prompt": False,
        },
    }


def model_card(
    name: str, pooling: PoolingConfig, instruction: str, facts: Mapping[str, Any], *, is_mean: bool, is_causal: bool
) -> str:
    """`README.md`: what the model is, how to use it, and one section for each of `facts`."""
    prompt = json.dumps(query_prompt(instruction), ensure_ascii=False)
    usage = _MEAN_USAGE if is_mean else _NV_EMBED_USAGE
    values = {"name": name, "prompt": prompt, "since": MEAN_SINCE}
    sections = [
        _FRONT_MATTER,
        f"# {name}",
        f"A text embedding model: Mistral layers and `{pooling.kind}` pooling, trained with nvembed_mcore.",
        "## Use",
        *([_MEAN_NEEDS.format(**values)] if is_mean and not is_causal else []),
        *(text.format(**values) for text in usage),
        "Queries carry an instruction, which is attended to and not pooled; documents carry none. "
        "A prompt of your own should keep the form `Instruct: ...\\nQuery: `, the space at the end included.",
    ]
    for title, fact in redact.tree(facts).items():
        sections += [f"## {str(title).replace('_', ' ').capitalize()}", _table(fact)]
    return "\n\n".join(sections) + "\n"


_FRONT_MATTER = """---
library_name: sentence-transformers
pipeline_tag: sentence-similarity
tags:
- sentence-transformers
- feature-extraction
- sentence-similarity
- nvembed_mcore
---"""


_NV_EMBED_USAGE = (
    """```python
from transformers import AutoModel
model = AutoModel.from_pretrained("{name}", trust_remote_code=True).eval()
scores = model.encode(["a query"], instruction={prompt}) @ model.encode(["a document"]).T
```""",
    "With sentence-transformers:",
    """```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("{name}", trust_remote_code=True)
scores = model.encode(["a query"], prompt_name="query") @ model.encode(["a document"]).T
```""",
)

_MEAN_NEEDS = (
    "A plain `MistralModel` without a causal mask, and no code of its own. **It needs transformers {since} or newer: "
    "older ones ignore `is_causal: false` and give other vectors without an error.** With sentence-transformers "
    "that means {since} or newer too."
)

_MEAN_USAGE = (
    """```python
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("{name}")
scores = model.encode(["a query"], prompt_name="query") @ model.encode(["a document"]).T
```""",
    "With transformers alone:",
    """```python
import torch
from transformers import AutoModel, AutoTokenizer
model, tokenizer = AutoModel.from_pretrained("{name}").eval(), AutoTokenizer.from_pretrained("{name}")

@torch.no_grad()
def embed(texts, prompt=""):
    inputs = tokenizer([prompt + text for text in texts], padding=True, truncation=True, return_tensors="pt")
    pooled = inputs["attention_mask"].clone()
    if prompt:  # all positions but those of <s> and the prompt; alone, the prompt has </s> behind it
        pooled[:, : len(tokenizer(prompt)["input_ids"]) - 1] = 0
    states = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state
    sums = (states.float() * pooled[..., None]).sum(1)
    return torch.nn.functional.normalize(sums, dim=-1)

scores = embed(["a query"], {prompt}) @ embed(["a document"]).T
```""",
)


def _table(fact: Any) -> str:
    if not isinstance(fact, Mapping):
        return _cell(fact)
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(key)} | {_cell(value)} |" for key, value in _flat(fact))])


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of nested mappings."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _cell(value: Any) -> str:
    """One line that cannot break out of a table."""
    return " ".join(str(value).split()).replace("|", "\\|")
