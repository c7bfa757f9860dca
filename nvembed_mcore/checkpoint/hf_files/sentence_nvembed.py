"""sentence-transformers' first and only module for a model whose texts cannot be pooled from its token states.

`modules.json` names it; it travels with the weights and works with sentence-transformers 3.4 to 6.x.
"""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers.models import Transformer


class NVEmbedTransformer(Transformer):
    """The model's own embeddings, with the prompt's tokens left out of the pool."""

    def forward(self, features: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Adds `sentence_embedding`, float32 [N, H] of unit length.

        `prompt_length`, which sentence-transformers puts beside the ids where there is a prompt, counts `<s>` too.
        """
        prompt_length = features.get("prompt_length")
        pool_mask = features["attention_mask"].clone()
        if prompt_length is not None:
            pool_mask[:, : int(torch.as_tensor(prompt_length).flatten()[0])] = 0
        ids, mask = features["input_ids"], features["attention_mask"]
        output = self.auto_model(ids, mask, pool_mask, prompt_length=prompt_length)
        features["sentence_embedding"] = output.sentence_embeddings
        return features

    def get_sentence_embedding_dimension(self) -> int:
        """H."""
        return self.auto_model.config.hidden_size
