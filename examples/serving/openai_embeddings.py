"""Answer OpenAI-style `/v1/embeddings` requests with an export, on LitServe.

    pip install 'nvembed_mcore[serve]'
    python examples/serving/openai_embeddings.py runs/quickstart/export --name quickstart --trust-remote-code

The name of the model in a request says what its texts are, as OpenAI's form has no field for it: `quickstart-query`
puts the instruction in front and leaves it out of the mean; `quickstart` and `quickstart-passage` are for documents.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import litserve
import numpy as np
from litserve.specs.openai_embedding import EmbeddingRequest
from starlette.responses import JSONResponse

PROMPTS = {"": "document", "-passage": "document", "-query": "query"}


class Spec(litserve.OpenAIEmbeddingSpec):
    """LitServe's `/v1/embeddings`, with errors in OpenAI's form, and `/v1/models`."""

    def __init__(self, name: str, dim: int) -> None:
        super().__init__()
        self.names = {name + ending: prompt for ending, prompt in PROMPTS.items()}
        self.dim = dim
        self.add_endpoint("/v1/models", self.models, ["GET"])

    async def models(self) -> JSONResponse:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "nvembed_mcore"} for name in self.names]
        return JSONResponse({"object": "list", "data": data})

    async def embeddings_endpoint(self, request: EmbeddingRequest) -> JSONResponse:
        status, message = self._fault(request)
        if message:
            error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            return JSONResponse({"error": error}, status_code=status)
        return JSONResponse((await super().embeddings_endpoint(request)).model_dump())

    def _fault(self, request: EmbeddingRequest) -> tuple[int, str]:
        if request.model not in self.names:
            return 404, f"no model {request.model!r} here; there are {', '.join(self.names)}"
        texts = request.ensure_list()
        if not texts or not all(isinstance(text, str) for text in texts):
            return 400, "input must be a text or a list of texts (token ids are not taken)"
        if blank := [number for number, text in enumerate(texts) if not text.strip()]:
            return 400, f"input {blank[0]} is blank"
        if request.dimensions is not None and not 1 <= request.dimensions <= self.dim:
            return 400, f"dimensions must be between 1 and {self.dim}, got {request.dimensions}"
        return 200, ""

    def decode_request(self, request: EmbeddingRequest, context_kwargs: dict | None = None) -> dict[str, Any]:
        """What a worker's `predict` gets."""
        prompt = self.names[request.model]
        return {"texts": request.ensure_list(), "prompt": prompt, "dimensions": request.dimensions}

    def encode_response(self, output: dict[str, Any], context_kwargs: dict | None = None) -> dict[str, Any]:
        return output


class Embeddings(litserve.LitAPI):
    """One worker: the export in sentence-transformers, on one device."""

    def __init__(self, export: str, spec: Spec, batch_size: int, trust_remote_code: bool) -> None:
        super().__init__(spec=spec)
        self.export, self.batch_size, self.trust_remote_code = export, batch_size, trust_remote_code

    def setup(self, device: str) -> None:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(self.export, device=device, trust_remote_code=self.trust_remote_code)

    def predict(self, request: dict[str, Any]) -> dict[str, Any]:
        texts, prompt = request["texts"], request["prompt"]
        vectors = self.model.encode(texts, prompt_name=prompt, batch_size=self.batch_size)
        if request["dimensions"]:  # for models trained with loss.matryoshka_dims
            vectors = vectors[:, : request["dimensions"]]
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        counted = self.model.tokenizer([self.model.prompts[prompt] + text for text in texts])["input_ids"]
        tokens = sum(min(len(ids), self.model.max_seq_length) for ids in counted)
        return {"embeddings": vectors.astype(float).tolist(), "prompt_tokens": tokens, "total_tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", help="written by `nvembed export-hf`, of either format")
    parser.add_argument("--name", default="nvembed", help="name of the model in requests (default nvembed)")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--workers-per-device", type=int, default=1, help="copies of the model on each device")
    parser.add_argument("--batch-size", type=int, default=32, help="texts in one forward pass")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a request may take (default 600)")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the folder's modelling file (format nv-embed)",
    )
    arguments = parser.parse_args()
    spec = Spec(arguments.name, _dimensions(arguments.export))
    server = litserve.LitServer(
        Embeddings(arguments.export, spec, arguments.batch_size, arguments.trust_remote_code),
        accelerator=arguments.accelerator,
        workers_per_device=arguments.workers_per_device,
        timeout=arguments.timeout,
    )
    server.run(host=arguments.host, port=arguments.port, generate_client_file=False)


def _dimensions(export: str) -> int:
    return json.loads((Path(export) / "config.json").read_text(encoding="utf-8"))["hidden_size"]


if __name__ == "__main__":
    main()
