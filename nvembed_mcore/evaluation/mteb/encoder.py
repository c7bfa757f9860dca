"""A model as mteb knows it: its `EncoderProtocol`. Imports mteb, so only those import this who run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType

from nvembed_mcore.evaluation.mteb.instructions import Instructions
from nvembed_mcore.evaluation.mteb.share import Request


class Encoder(AbsEncoder):
    """What `mteb.evaluate` takes: texts of a task to unit vectors, with the task's instruction in front."""

    def __init__(
        self, embed: Callable[[Request], np.ndarray], instructions: Instructions | None, meta: ModelMeta
    ) -> None:
        """
        Args:
            embed: unit vectors of a request's texts, float32 [texts, D].
            instructions: None: queries and documents as the model was trained on them.
        """
        self._embed, self._instructions = embed, instructions
        self.mteb_model_meta = meta

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> np.ndarray:
        """See `mteb.models.EncoderProtocol.encode`. A text that is there several times is embedded once."""
        texts = [text for batch in inputs for text in batch["text"]]
        instruction = None
        if self._instructions is not None:
            sides = self._instructions.of(task_metadata.name, task_metadata.type)
            instruction = sides.document if prompt_type == PromptType.document else sides.query
        place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        request = Request(list(place), instruction, prompt_type == PromptType.query)
        return self._embed(request)[[place[text] for text in texts]]


def describe_model(name: str, revision: str, dim: int, max_tokens: int | None, has_instructions: bool) -> ModelMeta:
    """What mteb writes beside the results.

    Args:
        name: as `organisation/model`.
    """
    return ModelMeta.create_empty(
        {
            "name": name,
            "revision": revision,
            "embed_dim": dim,
            "max_tokens": max_tokens,
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": has_instructions,
            "framework": ["PyTorch"],
        }
    )
