"""Load an export with the published NV-Embed modelling code, strictly, and compare embeddings with ours.

Run from the root of the repository:
    PYTHONPATH=. python tools/check_published_code.py EXPORT --code DIR --tokenizer DIR

The code is not shipped (its licence is CC-BY-NC-4.0): DIR is a folder with the published *.py files, and naming it
asks for that code to be run. It runs in an environment of its own, with the last transformers that it works with,
on a copy of the export. Texts fit into the limit, since the published code drops `</s>` from a text that is cut.

Exit code 1: a name is missing or unexpected, or a cosine is below the bound; 2: the input cannot be checked.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from nvembed_mcore.checkpoint.hf_load import exported_prompt, load_exported
from tools.compat.environments import build_environment

BOUND, LIMIT = 0.9999, 512
REQUIREMENTS = ["transformers~=4.47.0", "einops", "datasets"]
OTHER_PROMPT = "Instruct: Find texts about the same subject\nQuery: "
TEXTS = [
    "how do I sort a list of dictionaries by a key",
    "x",
    "James Joyce wrote Dubliners, a book of fifteen short stories, and published it in 1914. " * 8,
    "def add(a, b):\n    return a + b",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f642 e\u0301",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
]


def copy_of(export: Path, code: Path, tokenizer: Path, folder: Path) -> None:
    """The export's weights and configuration beside the published code, in `folder`.

    Raises:
        ValueError: the export is not one that the published code can hold, or there is no code.
    """
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    found = {name: config.get(name) for name in ("model_type", "pooling", "is_causal")}
    if found != {"model_type": "nvembed", "pooling": "latent", "is_causal": False}:
        raise ValueError(
            f"{export}: the published code runs bidirectional models with latent pooling, this is {found}"
        )
    sources = list(code.glob("*.py"))
    if not sources:
        raise ValueError(f"no *.py file in {code}")
    for file in sources:
        shutil.copy(file, folder)
    for file in export.glob("*.safetensors*"):
        os.symlink(file.resolve(), folder / file.name)
    config["text_config"]["_name_or_path"] = str(tokenizer.resolve())
    config["auto_map"] = {
        "AutoConfig": "configuration_nvembed.NVEmbedConfig",
        "AutoModel": "modeling_nvembed.NVEmbedModel",
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def job_of(export: Path) -> dict[str, Any]:
    """Texts, prompts and our own embeddings."""
    model = load_exported(export).float()
    prompts = {"documents": "", "queries": exported_prompt(export), "queries, another instruction": OTHER_PROMPT}
    expected = {way: model.encode(TEXTS, prompt, LIMIT).tolist() for way, prompt in prompts.items()}
    return {"prompts": prompts, "texts": dict.fromkeys(prompts, TEXTS), "limit": LIMIT, "expected": expected}


def check(export: Path, code: Path, tokenizer: Path, environments: Path) -> dict[str, Any]:
    """What `tools/compat/published.py` found, and the versions it ran with."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        copy_of(export, code, tokenizer, folder)
        job, result = Path(scratch) / "job.json", Path(scratch) / "result.json"
        job.write_text(json.dumps(job_of(export)), encoding="utf-8")
        environment = build_environment(environments / "published", REQUIREMENTS)
        script = Path(__file__).parent / "compat" / "published.py"
        settings = {"HF_HOME": scratch, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([environment.python, "-P", script, folder, job, result], env=settings, check=True)  # noqa: S603
        return {**json.loads(result.read_text(encoding="utf-8")), "versions": environment.versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path, metavar="EXPORT", help="a folder in the format nv-embed")
    parser.add_argument("--code", type=Path, required=True, help="folder of the published *.py files; they are run")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer that it loads")
    parser.add_argument("--json", type=Path, help="write cosines and names here")
    parser.add_argument("--environments", type=Path, default=Path("cache"), help="where it is kept (%(default)s)")
    arguments = parser.parse_args()
    try:
        found = check(arguments.export, arguments.code, arguments.tokenizer, arguments.environments.resolve())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    wrong = {kind: names for kind, names in found.items() if kind.endswith("_keys") and names}
    for kind, names in wrong.items():
        print(f"{kind}: {', '.join(names)}")
    for way, cosine in found["cosines"].items():
        print(f"{way}: smallest cosine {cosine:.7f}")
    return int(bool(wrong) or min(found["cosines"].values()) < BOUND)


if __name__ == "__main__":
    sys.exit(main())
