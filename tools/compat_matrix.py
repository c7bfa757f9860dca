"""Load exports with every supported version of transformers and sentence-transformers, and compare embeddings of
documents and queries with the trainer's.

Run from the root of the repository: OMP_NUM_THREADS=1 PYTHONPATH=. python tools/compat_matrix.py [EXPORT ...]

Builds one virtual environment for each line of `PAIRS` (torch is borrowed from the running one), by package name from
pip's own configuration. The figures of --json are smallest cosines, by `EXPORT | versions | cell`. Exit code 1: a cell
is below the bound or failed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from packaging.version import Version

from nvembed_mcore.checkpoint.export_metadata import MEAN_SINCE
from nvembed_mcore.checkpoint.hf_load import exported_prompt
from nvembed_mcore.progress import show_each
from tools.compat.environments import Environment, build_environment
from tools.compat.probe import CAUSAL, NOT_RUN
from tools.compat.trainer import Trainer, make_exports

BOUND = 0.9999
PAIRS = (
    ("transformers~=4.42.0", "sentence-transformers~=3.4.0"),
    ("transformers~=4.47.0", "sentence-transformers~=4.1.0"),
    ("transformers~=4.51.0", "sentence-transformers~=5.1.0"),
    ("transformers~=4.57.0", "sentence-transformers~=5.1.0"),
    ("transformers~=5.1.0", "sentence-transformers~=5.2.0"),
    ("transformers~=5.2.0", "sentence-transformers~=5.2.0"),
    ("transformers~=5.2", "sentence-transformers~=6.0"),
)
OTHER_INSTRUCTION = "Find texts about the same subject"
TEXTS = [
    "how do I sort a list of dictionaries by a key",
    "x",
    "James Joyce wrote Dubliners, a book of fifteen short stories, and published it in 1914. " * 12,
    " spaces   around ",
    "def add(a, b):\n    return a + b\n",
    "ends in a colon:",
    "na\u00efve \u65e5\u672c\u8a9e \U0001f642 e\u0301",
    "\nbegins with a line break",
    "The quick brown fox jumps over the lazy dog, and the dog does not mind.",
]

INTRODUCTION = """# Which libraries load an export

Each cell is the smallest cosine between an embedding that a library makes from an exported folder and the trainer's
own, over {texts} texts: as documents, as queries with the exported instruction, and as queries with another one. One
of the texts is longer than the limit of {limit} tokens and is cut.

- The reference is the trainer's `Encoder` (packed texts, one process, float32) with the export's weights. For bfloat16
  and float16 these are rounded to that type first: the cell shows what the library's arithmetic in that type does, and
  not that a rounded model is another model.
- The exports: random weights, norms that are not one, sharp attention in the pooling heads; hidden size 64, 2 layers,
  Mistral's tokenizer. With the other mask their vectors have cosines below 0.8. `nv-embed` is loaded with
  `trust_remote_code=True`, `mean` without.
- First lines: `AutoModel` and the model's `encode` (for `mean`: the lines on its card). Lines of
  sentence-transformers: float32, `sdpa`; documents, `prompt_name="query"`, `prompt="..."`. Before version 6 it strips
  white space around a text; texts with such space are left out there.
- `flash (stand-in)`: the path of `flash_attention_2` (a mask of two dimensions, `is_causal` of each layer) with
  torch's attention in place of the kernel, which needs a GPU. `not run`: that version of transformers has no table of
  attention functions to put it in.
- `not supported (causal)`: measured; the library ignores `is_causal: false`, so the first state stays what it is when
  the last token changes. `mean` needs transformers 5.2 or newer, and thereby sentence-transformers 5.2 or newer.
- transformers 4.42 knows no `head_dim` other than hidden size / heads, which all Mistral-7B models have.

Bound: {bound}. Smallest of all cells: **{worst}**.

Written by `tools/compat_matrix.py` on {date}, commit {commit}: `{command}`.
CPU ({processor}), Python {python}; the trainer ran with torch {torch} and transformers {transformers}.

## Environments

"""


def job_of(folder: Path, tokenizer: Path | None) -> dict[str, Any]:
    """What `tools/compat/probe.py` is to embed, with the trainer's embeddings."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    limit = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))["max_seq_length"]
    prompt = exported_prompt(folder)
    own = prompt.removeprefix("Instruct: ").removesuffix("\nQuery: ")
    instructions = {"documents": "", "prompt_name": own, "prompt": OTHER_INSTRUCTION}
    trainer, expected = Trainer(folder, tokenizer), {}
    for dtype in ("float32", "bfloat16", "float16"):
        trainer.load(dtype)
        expected[dtype] = {way: trainer.embed(TEXTS, one, limit).tolist() for way, one in instructions.items()}
    return {
        "name": folder.name,
        "folder": str(folder.resolve()),
        "format": "mean" if config["model_type"] == "mistral" else "nv-embed",
        "causal": config["is_causal"],
        "texts": TEXTS,
        "limit": limit,
        "prompts": {"documents": "", "prompt_name": prompt, "prompt": f"Instruct: {OTHER_INSTRUCTION}\nQuery: "},
        "expected": expected,
    }


def probe(environment: Environment, jobs: list[dict[str, Any]], folder: Path) -> dict[str, dict[str, Any]]:
    """Every export's cells in one environment."""
    job, result = folder / "job.json", folder / "result.json"
    job.write_text(json.dumps(jobs), encoding="utf-8")
    script = Path(__file__).parent / "compat" / "probe.py"
    settings = {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    subprocess.run([environment.python, "-P", script, job, result], env=settings, check=True)  # noqa: S603
    return json.loads(result.read_text(encoding="utf-8"))


def shown(cell: float | str) -> str:
    """A cosine with six digits, never rounded up."""
    return " ".join(cell.split()) if isinstance(cell, str) else f"{math.floor(cell * 1e6) / 1e6:.6f}"


def title_of(environment: Environment) -> str:
    return f"{environment.versions['transformers']} / {environment.versions['sentence-transformers']}"


def tables(results: dict[str, dict[str, dict[str, Any]]], environments: list[Environment]) -> str:
    """Versions of the environments, then one table for each export."""
    names = list(environments[0].versions)
    text = _row(names) + _row(["---"] * len(names))
    text += "".join(_row([one.versions[name] for name in names]) for one in environments)
    titles = [title_of(one) for one in environments]
    for export in results[titles[0]]:
        cells = list(dict.fromkeys(cell for title in titles for cell in results[title][export]))
        text += f"\n## `{export}`\n\n" + _row(["transformers / sentence-transformers", *titles])
        text += _row(["---"] * (len(titles) + 1))
        for cell in cells:
            text += _row([cell, *(shown(results[title][export].get(cell, "")) for title in titles)])
    return text


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |\n"


def document(results: dict, environments: list[Environment], limit: int, worst: float) -> str:
    from tools.gradient_proof import git, processor

    return INTRODUCTION.format(
        texts=len(TEXTS),
        limit=limit,
        bound=BOUND,
        worst=shown(worst),
        date=datetime.date.today(),
        commit=git("rev-parse", "--short", "HEAD") + ("" if not git("status", "--porcelain", "-uno") else ", changed"),
        command="PYTHONPATH=. python tools/compat_matrix.py",
        processor=processor(),
        python=platform.python_version(),
        torch=_version("torch"),
        transformers=_version("transformers"),
    ) + tables(results, environments)


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def run(jobs: list[dict[str, Any]], folder: Path) -> tuple[dict, list[Environment]]:
    """Results by versions, export and cell; the environments."""
    results, environments = {}, []
    for pair in show_each(PAIRS, "try", "pairs of versions"):
        name = "-".join(text.partition("~=")[2] for text in pair)
        environments.append(build_environment(folder / f"compat-{name}", list(pair)))
        print(f"{title_of(environments[-1])} ...", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            results[title_of(environments[-1])] = probe(environments[-1], jobs, Path(scratch))
    return results, environments


def main() -> int:
    """Returns 1 where a cell is below the bound or failed; everything is written all the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", nargs="*", type=Path, metavar="EXPORT", help="default: tiny ones, made here")
    parser.add_argument("--output", type=Path, help="write the table here as well (Markdown)")
    parser.add_argument("--json", type=Path, help="write the figures here (flat JSON)")
    parser.add_argument("--environments", type=Path, default=Path("cache"), help="where they are kept (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        exports = arguments.exports or make_exports(Path(scratch))
        tokenizer = None if arguments.exports else Path(scratch) / "tokenizer"
        jobs = [job_of(export, tokenizer) for export in exports]
        results, environments = run(jobs, arguments.environments.resolve())
    flat = {
        f"{export} | {title} | {cell}": value
        for title, by_export in results.items()
        for export, cells in by_export.items()
        for cell, value in cells.items()
    }
    worst = min(value for value in flat.values() if isinstance(value, float))
    print(tables(results, environments))
    if arguments.output:
        arguments.output.write_text(document(results, environments, jobs[0]["limit"], worst), encoding="utf-8")
    if arguments.json:
        arguments.json.write_text(json.dumps(flat, indent=1) + "\n", encoding="utf-8")
    bad = bad_cells(results, environments, {job["name"]: job["format"] for job in jobs})
    print("\n".join([f"below {BOUND} or failed:", *bad]) if bad else f"{len(flat)} cells, the smallest {shown(worst)}")
    return int(bool(bad))


def bad_cells(
    results: dict[str, dict[str, dict[str, Any]]], environments: list[Environment], formats: dict[str, str]
) -> list[str]:
    """`EXPORT | versions | cell` of those that are below the bound or say what should not be.

    Args:
        formats: of each export, by its name.
    """
    return [
        f"{export} | {title_of(one)} | {cell}"
        for one in environments
        for export, cells in results[title_of(one)].items()
        for cell, value in cells.items()
        if not _is_good(value, formats[export], one.versions["transformers"])
    ]


def _is_good(value: float | str, format: str, transformers: str) -> bool:
    if value == CAUSAL:  # what the card says of these versions
        return format == "mean" and Version(transformers) < Version(MEAN_SINCE)
    return value >= BOUND if isinstance(value, float) else value == NOT_RUN


if __name__ == "__main__":
    sys.exit(main())
