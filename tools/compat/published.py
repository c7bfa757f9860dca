"""Runs inside the environment of `check_published_code`: loads a folder with the code in it, and compares.

    python published.py FOLDER JOB.json RESULT.json

JOB has `prompts` (way -> prompt), `texts` (way -> texts), `limit` and `expected` (way -> embeddings). RESULT has the
names that loading reported, and the smallest cosine of each way.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModel


@torch.no_grad()
def main() -> None:
    folder, job_file, result_file = sys.argv[1:]
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    model, report = AutoModel.from_pretrained(
        folder, trust_remote_code=True, torch_dtype=torch.float32, output_loading_info=True
    )
    cosines = {}
    for way, prompt in job["prompts"].items():
        found = model.eval().encode(job["texts"][way], instruction=prompt, max_length=job["limit"])
        expected = torch.tensor(job["expected"][way], dtype=torch.float64)
        cosines[way] = F.cosine_similarity(found.double().cpu(), expected, dim=-1).nan_to_num(-1.0).min().item()
    names = {kind: sorted(map(str, report[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    Path(result_file).write_text(json.dumps({**names, "cosines": cosines}), encoding="utf-8")


if __name__ == "__main__":
    main()
