"""Every run of examples/ is valid, and the NV-Embed recipes have the paper's values (tables 11, 12)."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

from nvembed_mcore.cli import parser
from nvembed_mcore.cli.run_config import read_run_config
from nvembed_mcore.config import DatasetConfig, RunConfig
from nvembed_mcore.data.plan import as_json, plan_stage

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPES = EXAMPLES / "recipes"
VERSIONS = ("nv_embed_v1", "nv_embed_v2")
V1_RETRIEVAL = "msmarco hotpotqa natural_questions paq stackexchange nli squad arguana bioasq fiqa fever".split()
ADDED_IN_V2 = "hover scifact nfcorpus miracl mr_tydi".split()
BINARY = "amazon_counterfactual amazon_polarity imdb toxic_conversations".split()
BY_EXAMPLE = "emotion massive_intent massive_scenario mtop_domain mtop_intent".split()
CHOSEN_BY_EXAMPLE = "amazon_reviews banking77 tweet_sentiment_extraction".split()

SAMPLES = {  # Table 12, in hundreds
    "arguana": 160, "nli": 2700, "paq": 5000, "msmarco": 5000, "squad": 870, "stackexchange": 800,
    "natural_questions": 1000, "hotpotqa": 1700, "fever": 1400, "fiqa": 50, "bioasq": 24, "hover": 170,
    "nfcorpus": 36, "miracl": 20, "mr_tydi": 20, "scifact": 9, "sts12": 18, "sts22": 3, "stsb": 27,
    "amazon_counterfactual": 60, "amazon_polarity": 200, "amazon_reviews": 400, "banking77": 100, "emotion": 160,
    "imdb": 240, "mtop_intent": 150, "mtop_domain": 150, "massive_intent": 110, "massive_scenario": 110,
    "toxic_conversations": 500, "tweet_sentiment_extraction": 270, "arxiv_p2p": 500, "arxiv_s2s": 500,
    "biorxiv_p2p": 150, "biorxiv_s2s": 150, "medrxiv_p2p": 23, "medrxiv_s2s": 23, "reddit": 500, "reddit_p2p": 400,
    "stackexchange_clustering": 500, "stackexchange_clustering_p2p": 400, "twenty_newsgroups": 17,
}  # fmt: skip


@pytest.fixture(scope="module", params=VERSIONS)
def version(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def stages(version) -> tuple[RunConfig, RunConfig]:
    first, second = (read_run_config([str(RECIPES / version / f"stage{number}.yaml")]) for number in (1, 2))
    return first, second


def name_of(dataset: DatasetConfig) -> str:
    """The data set's name: its file without the form of its documents."""
    return re.sub("_(labels|examples)$", "", Path(dataset.path).stem)


def form_of(dataset: DatasetConfig) -> str:
    """`labels`, `examples`, or nothing where a file is no matter of form."""
    return (re.findall("_(labels|examples)$", Path(dataset.path).stem) or [""])[0]


@pytest.mark.parametrize(
    "path",
    sorted(path for path in EXAMPLES.rglob("*.yaml") if path.parent.name != "scaling"),  # these are studies of runs
    ids=lambda path: str(path.relative_to(EXAMPLES)),
)
def test_examples_are_valid_runs(path):
    config = read_run_config([str(path)])
    assert config.stage in (1, 2)
    assert config.optim.warmup_steps < config.steps
    assert len({dataset.path for dataset in config.data.datasets}) == len(config.data.datasets)


def test_the_paper_s_values(stages):
    for config, steps, rate in zip(stages, (20_000, 18_000), (2e-5, 1.5e-5), strict=True):
        assert (config.steps, config.optim.lr) == (steps, rate)
        assert config.batch_size == 128
        assert (config.optim.warmup_steps, config.optim.weight_decay) == (50, 0.03)
        assert (config.data.max_query_tokens, config.data.max_document_tokens) == (512, 512)
        assert (config.model.attention_mask, config.precision.dtype) == ("bidirectional", "bfloat16")
        pooling = config.model.pooling
        assert (pooling.kind, pooling.num_latents, pooling.num_heads) == ("latent", 512, 8)
        lora = config.model.lora
        assert (lora.rank, lora.alpha, lora.dropout) == (16, 32.0, 0.1)
        assert {dataset.num_negatives for dataset in config.data.datasets} == {7}


def test_what_the_paper_leaves_open_is_the_same_in_both_stages(stages):
    first, second = stages
    for name in ("loss", "parallel", "step", "checkpoint", "seed"):
        assert getattr(first, name) == getattr(second, name)
    for name in ("betas", "eps", "clip_norm", "min_lr"):
        assert getattr(first.optim, name) == getattr(second.optim, name)
    assert first.loss.temperature == 0.02
    assert first.optim.min_lr == 0.0
    assert first.data.blend_temperature == second.data.blend_temperature == 1.0
    assert not first.data.one_dataset_batches and not second.data.one_dataset_batches
    assert all(one.weight is None for config in stages for one in config.data.datasets)


def test_stage_2_goes_on_from_stage_1(stages):
    first, second = stages
    assert first.model.init_from == "checkpoints/Mistral-7B-v0.1"
    assert second.model.init_from == first.run_dir != second.run_dir
    assert (first.stage, second.stage) == (1, 2)
    assert first.model.pooling == second.model.pooling and first.model.lora == second.model.lora
    assert first.data.tokenizer == second.data.tokenizer


def test_the_sets_of_each_stage(version, stages):
    first, second = (config.data.datasets for config in stages)
    wanted = {*V1_RETRIEVAL} if version == "nv_embed_v1" else {*V1_RETRIEVAL, *ADDED_IN_V2}
    synthetic = [one for one in first if name_of(one) == "synthetic"]
    assert {name_of(one) for one in first} - {"synthetic"} == wanted
    assert [one.max_records for one in synthetic] == ([] if version == "nv_embed_v1" else [120_000])
    assert Counter(one.task for one in first) == {"retrieval": len(wanted) + len(synthetic)}
    assert Counter(one.task for one in second) == {
        "retrieval": len(wanted),
        "sts": 3,
        "classification": 12,
        "clustering": 11,
    }
    assert [plain(one) for one in first if one not in synthetic] == [
        plain(one) for one in second if one.task == "retrieval"
    ]
    assert all(one.instruction for one in (*first, *second))


def plain(dataset: DatasetConfig) -> tuple[str, str, int | None]:
    return dataset.path, dataset.instruction, dataset.max_records


def test_the_switches(stages):
    first, second = (config.data.datasets for config in stages)
    assert all(one.uses_in_batch_negatives for one in first)
    assert not any(one.uses_in_batch_negatives for one in second)
    assert {one.task for one in second if one.instructs_documents} == {"sts"}
    assert not any(one.instructs_documents for one in first)


def test_the_form_of_documents(version, stages):
    """v1: label texts throughout. v2: two classes by label; clustering and the paper's five sets by example."""
    second = stages[1].data.datasets
    forms = {name_of(one): form_of(one) for one in second}
    assert {forms[name_of(one)] for one in second if one.task in ("retrieval", "sts")} == {""}
    clustering = [name_of(one) for one in second if one.task == "clustering"]
    assert {name_of(one) for one in second if one.task == "classification"} == {
        *BINARY,
        *BY_EXAMPLE,
        *CHOSEN_BY_EXAMPLE,
    }
    assert {forms[name] for name in BINARY} == {"labels"}
    rest = {forms[name] for name in (*clustering, *BY_EXAMPLE, *CHOSEN_BY_EXAMPLE)}
    assert rest == ({"labels"} if version == "nv_embed_v1" else {"examples"})


def test_table_12(version, stages):
    datasets = {name_of(one): one for config in stages for one in config.data.datasets}
    datasets.pop("synthetic", None)
    for name, dataset in datasets.items():
        assert dataset.max_records == 100 * SAMPLES[name], name
    assert {*SAMPLES} - {*datasets} == ({*ADDED_IN_V2} if version == "nv_embed_v1" else set())
    retrieval = sum(one.max_records for one in datasets.values() if one.task == "retrieval")
    rest = sum(one.max_records for one in datasets.values() if one.task != "retrieval")
    assert round(rest / 1e6, 3) == 0.566
    assert round(retrieval / 1e6, 3) == (1.870 if version == "nv_embed_v1" else 1.896)


def test_the_plan_has_the_paper_s_number_of_queries(version, stages):
    """No file of data is needed; the passes are those that speak for sampling by records."""
    plan = as_json([plan_stage(config, "recipe") for config in stages])
    assert [stage["draws"] for stage in plan["stages"]] == [20_000 * 128, 18_000 * 128]
    passes = [round(one["draws"] / sum(d["used"] for d in one["datasets"]), 2) for one in plan["stages"]]
    assert passes == ([1.37, 0.95] if version == "nv_embed_v1" else [1.27, 0.94])
    assert not any(one["is_counted"] for stage in plan["stages"] for one in stage["datasets"])


def commands(text: str) -> dict[str, str]:
    """Path of each data set -> what the comment above it says of its making."""
    found, comment = {}, []
    for line in text.splitlines():
        if line.startswith("    # "):
            comment.append(line.removeprefix("    # ").strip())
        elif line.startswith("    - path: "):
            joined = "\n".join(comment).replace("\\\n", "")
            found[line.removeprefix("    - path: ")] = joined.splitlines()[-1]
            comment = []
    return found


def test_each_set_says_how_it_is_made_and_the_table_has_it(version):
    readme = (RECIPES / "README.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith("| ")]
    for stage in (1, 2):
        text = (RECIPES / version / f"stage{stage}.yaml").read_text(encoding="utf-8")
        made = commands(text)
        assert [*made] == [
            one.path for one in read_run_config([str(RECIPES / version / f"stage{stage}.yaml")]).data.datasets
        ]
        for path, how in made.items():
            (row,) = [row for row in rows if f"`{path}`" in row]
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            assert version.removeprefix("nv_embed_") in cells[3] and str(stage) in cells[4]
            if how.startswith("nvembed data convert "):
                assert parser().parse_args(shlex.split(how)[1:]).output == path, "a command that the program takes"
                form = re.findall("--by (label|example) ", how)
                general = how.replace(f"--by {form[0]}", "--by FORM").replace(path, "FILE") if form else how
                assert cells[-1].strip("`") in (how, general), path
            else:
                assert how.rstrip(".").lower() == cells[-1].lower(), path
    assert len(rows) == 1 + len(SAMPLES) + 1, "a head, the rows of Table 12, and the synthetic examples"
