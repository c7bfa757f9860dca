"""What a resumed run may change: every field of the configuration has its class, and each refusal its words."""

from __future__ import annotations

import ast
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from nvembed_mcore import config as configuration
from nvembed_mcore import resume
from nvembed_mcore.checkpoint.store import Checkpoint, CheckpointError
from nvembed_mcore.config import ConfigError, EvalConfig, EvalSetConfig, RunConfig
from nvembed_mcore.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from nvembed_mcore.identity import ARCHITECTURE, kind_of, logged_changes, refused_changes
from nvembed_mcore.train import _prepare_run_dir
from tests.helpers import runs
from tests.helpers.models import tiny_config

ROOT = Path(__file__).parents[2]
CONFIG = dataclasses.replace(
    runs.run_config(Path("inputs"), Path("run")), eval=EvalConfig(sets=[EvalSetConfig(name="set", path="beir")])
)


def fields(of: type, prefix: str = "") -> Iterator[str]:
    """Every field of the configuration, as `data.datasets.weight`."""
    sections = {one.__name__: one for one in vars(configuration).values() if dataclasses.is_dataclass(one)}
    for field in dataclasses.fields(of):
        section = field.type.removeprefix("list[").removesuffix("]")
        if section in sections:
            yield from fields(sections[section], f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


FIELDS = list(fields(RunConfig))

# One row for each field: another value, and the line that refuses it.
IDENTITY: dict[str, tuple[Any, str]] = {
    "stage": (2, "stage: 1 -> 2"),
    "seed": (5, "seed: 1234 -> 5"),
    "steps": (9, "steps: 8 -> 9"),
    "batch_size": (8, "batch_size: 9 -> 8"),
    "data.blend_temperature": (2.0, "data.blend_temperature: 1.0 -> 2.0"),
    "data.one_dataset_batches": (True, "data.one_dataset_batches: False -> True"),
    "data.max_query_tokens": (16, "data.max_query_tokens: 24 -> 16"),
    "data.max_document_tokens": (16, "data.max_document_tokens: 32 -> 16"),
    "data.datasets.task": ("sts", "data.datasets.0.task: 'retrieval' -> 'sts'"),
    "data.datasets.weight": (2.0, "data.datasets.0.weight: None -> 2.0"),
    "data.datasets.max_records": (9, "data.datasets.0.max_records: None -> 9"),
    "data.datasets.in_batch_negatives": (False, "data.datasets.0.in_batch_negatives: None -> False"),
    "data.datasets.num_positives": (2, "data.datasets.0.num_positives: 1 -> 2"),
    "data.datasets.num_negatives": (3, "data.datasets.0.num_negatives: 2 -> 3"),
    "data.datasets.distill": (False, "data.datasets.0.distill: True -> False"),
    "model.attention_mask": ("causal", "model.attention_mask: 'bidirectional' -> 'causal'"),
    "model.pooling.kind": ("mean", "model.pooling.kind: 'latent' -> 'mean'"),
    "model.pooling.num_latents": (7, "model.pooling.num_latents: 6 -> 7"),
    "model.pooling.num_heads": (2, "model.pooling.num_heads: 4 -> 2"),
    "model.pooling.head_width": (None, "model.pooling.head_width: 12 -> None"),
    "loss.temperature": (0.2, "loss.temperature: 0.1 -> 0.2"),
    "loss.learn_temperature": (True, "loss.learn_temperature: False -> True"),
    "loss.temperature_range": ((0.01, 1.0), "loss.temperature_range: [0.005, 1.0] -> [0.01, 1.0]"),
    "loss.mask_same_document": (False, "loss.mask_same_document: True -> False"),
    "loss.in_batch_from": ("dataset", "loss.in_batch_from: 'batch' -> 'dataset'"),
    "loss.share_hard_negatives": (False, "loss.share_hard_negatives: True -> False"),
    "loss.false_negative_margin": (0.1, "loss.false_negative_margin: None -> 0.1"),
    "loss.symmetric": (True, "loss.symmetric: False -> True"),
    "loss.matryoshka_dims": ([8], "loss.matryoshka_dims: [] -> [8]"),
    "loss.distillation.weight": (1.0, "loss.distillation.weight: 0.0 -> 1.0"),
    "loss.distillation.teacher_temperature": (1.0, "loss.distillation.teacher_temperature: None -> 1.0"),
    "loss.r_drop_weight": (0.5, "loss.r_drop_weight: 0.0 -> 0.5"),
    "step.fgm_epsilon": (0.1, "step.fgm_epsilon: 0.0 -> 0.1"),
    "step.fgm_weight": (0.5, "step.fgm_weight: 1.0 -> 0.5"),
    "optim.lr": (1e-3, "optim.lr: 0.002 -> 0.001"),
    "optim.min_lr": (1e-4, "optim.min_lr: 0.0 -> 0.0001"),
    "optim.warmup_steps": (3, "optim.warmup_steps: 2 -> 3"),
    "optim.weight_decay": (0.0, "optim.weight_decay: 0.03 -> 0.0"),
    "optim.betas": ((0.9, 0.98), "optim.betas: [0.9, 0.999] -> [0.9, 0.98]"),
    "optim.eps": (1e-6, "optim.eps: 1e-08 -> 1e-06"),
    "optim.clip_norm": (0.0, "optim.clip_norm: 1.0 -> 0.0"),
    "optim.ema_decay": (0.999, "optim.ema_decay: None -> 0.999"),
}
RESUMABLE: dict[str, tuple[Any, str]] = {
    "optim.distributed": (False, "optim.distributed: True -> False"),
    "parallel.tp": (2, "parallel.tp: 1 -> 2"),
    "parallel.pp": (2, "parallel.pp: 1 -> 2"),
    "parallel.cp": (2, "parallel.cp: 1 -> 2"),
    "parallel.chunks_per_stage": (2, "parallel.chunks_per_stage: 1 -> 2"),
    "parallel.layers_in_first_stage": (3, "parallel.layers_in_first_stage: None -> 3"),
    "parallel.layers_in_last_stage": (1, "parallel.layers_in_last_stage: None -> 1"),
    "parallel.sequence_parallel": (False, "parallel.sequence_parallel: True -> False"),
    "parallel.overlap_grad_reduce": (True, "parallel.overlap_grad_reduce: False -> True"),
    "parallel.overlap_param_gather": (True, "parallel.overlap_param_gather: False -> True"),
    "parallel.bucket_size": (10, "parallel.bucket_size: None -> 10"),
    "model.backend": ("local", "model.backend: 'auto' -> 'local'"),
    "precision.fp8": ("tensorwise", "precision.fp8: 'off' -> 'tensorwise'"),
    "precision.fp8_attention": ("auto", "precision.fp8_attention: 'off' -> 'auto'"),
    "step.way": ("cached", "step.way: 'auto' -> 'cached'"),
    "step.tokens_per_microbatch": (99, "step.tokens_per_microbatch: 160 -> 99"),
    "step.gradient_exchange": ("recompute", "step.gradient_exchange: 'auto' -> 'recompute'"),
}
CONTENT = {
    "data.tokenizer",
    "data.max_bad_records",
    "data.datasets.path",
    "data.datasets.instruction",
    "data.datasets.instruct_documents",
    "model.config",
    "model.init_from",
    "precision.dtype",
    "model.lora.rank",
    "model.lora.alpha",
    "model.lora.dropout",
    "model.lora.targets",
}
FREE = {
    "run_dir",
    "stop_at",
    "max_minutes",
    "data.cache_dir",
    "model.pooling.initializer_range",
    "model.lora.init_from",
    "parallel.timeout_minutes",
}
FREE_SECTIONS = ("checkpoint.", "eval.", "log.")


def test_every_field_has_its_class():
    """A new field is in none of these lists, and fails here until somebody has thought about it."""
    assert len(FIELDS) > 60 and len(set(FIELDS)) == len(FIELDS)
    found = {
        kind: {field for field in FIELDS if kind_of(field) == kind} for kind in ("identity", "content", "resumable")
    }
    free = {field for field in FIELDS if kind_of(field) == "free" and not field.startswith(FREE_SECTIONS)}
    assert found["identity"] == IDENTITY.keys()
    assert found["content"] == CONTENT
    assert found["resumable"] == RESUMABLE.keys()
    assert free == FREE
    with pytest.raises(KeyError):
        kind_of("data.no_such_field")


def facts() -> dict[str, Any]:
    """Of a run on two processes, as JSON gives them back."""
    tokens = {"format": 1, "data": "d" * 64, "query_prompt": "Instruct: Find it\nQuery: ", "document_prompt": ""}
    return json.loads(
        json.dumps(
            {
                "config": resume.plain(CONFIG),
                "hf_config": tiny_config().to_dict(),
                "stores": [tokens | {"rejected": {"records": 0}}],
                "tokenizer": "a" * 64,
                "precision": "float32",
                "hardware": {"device": "cpu", "world_size": 2},
            }
        )
    )


def changed(field: str, value: Any) -> dict[str, Any]:
    """The same run's facts with another value of one field of the configuration, or of one of the facts."""
    found = facts()
    *path, name = field.split(".")
    place = found if path[:1] in (["stores"], ["hf_config"], ["hardware"]) or field in found else found["config"]
    for key in path:
        place = place[key]
        place = place[0] if isinstance(place, list) else place
    assert name in place
    place[name] = json.loads(json.dumps(value))
    return found


@pytest.mark.parametrize("field", IDENTITY)
def test_what_fixes_the_run_is_refused(field):
    value, line = IDENTITY[field]
    assert refused_changes(facts(), changed(field, value)) == [line]
    assert logged_changes(facts(), changed(field, value)) == []


@pytest.mark.parametrize("field", RESUMABLE)
def test_what_may_change_is_told(field):
    value, line = RESUMABLE[field]
    assert refused_changes(facts(), changed(field, value)) == []
    assert logged_changes(facts(), changed(field, value)) == [line]


@pytest.mark.parametrize(
    "field", [field for field in FIELDS if kind_of(field) in ("free", "content") and field != "model.lora.rank"]
)
def test_what_does_not_matter_by_itself_is_not_told(field):
    """Paths may move; that what lies there is the same is seen in the facts below. Adapters have a test of theirs."""
    now = changed(field, "elsewhere")
    assert refused_changes(facts(), now) == [] == logged_changes(facts(), now)


@pytest.mark.parametrize(
    ("field", "value", "lines"),
    [
        (
            "stores.data",
            "0123456789abcdef" * 4,
            ["data.datasets.0.data: 'dddddddddddddddd' -> '0123456789abcdef' (the content of inputs/train.jsonl)"],
        ),
        (
            "stores.query_prompt",
            "Instruct: Find that\nQuery: ",
            [r"data.datasets.0.query_prompt: 'Instruct: Find it\nQuery: ' -> 'Instruct: Find that\nQuery: '"],
        ),
        ("stores.document_prompt", "x", ["data.datasets.0.document_prompt: '' -> 'x'"]),
        (
            "stores.rejected",
            {"records": 1, "lines": "ab"},
            ["data.datasets.0.rejected.lines: None -> 'ab'", "data.datasets.0.rejected.records: 0 -> 1"],
        ),
        ("stores.format", 2, ["data.datasets.0.format: 1 -> 2"]),
        (
            "tokenizer",
            "b" * 64,
            ["data.tokenizer: 'aaaaaaaaaaaaaaaa' -> 'bbbbbbbbbbbbbbbb' (the content of inputs/tokenizer)"],
        ),
        ("precision", "bfloat16", ["precision.dtype: 'float32' -> 'bfloat16'"]),
        ("hf_config.hidden_size", 64, ["hf_config.hidden_size: 32 -> 64"]),
        ("hf_config.attention_dropout", 0.1, ["hf_config.attention_dropout: 0.0 -> 0.1"]),
        (
            "hf_config.rope_parameters",
            {"rope_theta": 1e6, "rope_type": "default"},
            ["hf_config.rope_parameters.rope_theta: 10000.0 -> 1000000.0"],
        ),
        ("hf_config.transformers_version", "6.0.0", []),
        ("hf_config.use_cache", False, []),
    ],
)
def test_contents_are_compared(field, value, lines):
    assert refused_changes(facts(), changed(field, value)) == lines


def test_another_number_of_data_sets():
    now = facts()
    now["config"]["data"]["datasets"] *= 2
    assert refused_changes(facts(), now) == [
        "data.datasets: ['inputs/train.jsonl'] -> ['inputs/train.jsonl', 'inputs/train.jsonl']"
    ]


def test_adapters_are_one_thing():
    """Their settings say nothing where there are none, and the order of the targets nothing at all."""
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.1, "targets": ["v", "q"], "init_from": None}
    without, saved = changed("model.lora", lora | {"rank": 0}), changed("model.lora", lora)
    assert refused_changes(facts(), without) == []
    (line,) = refused_changes(facts(), saved)
    assert line.startswith("model.lora: None -> {'rank': 4, 'alpha': 8.0, ")
    assert refused_changes(saved, changed("model.lora", lora | {"targets": ["q", "v"], "init_from": "x"})) == []
    assert refused_changes(saved, changed("model.lora", lora | {"dropout": 0.0})) == ["model.lora.dropout: 0.1 -> 0.0"]


def test_processes_and_device_are_told():
    now = changed("hardware.world_size", 4)
    now["hardware"]["device"] = "NVIDIA H100"
    assert logged_changes(facts(), now) == ["device: 'cpu' -> 'NVIDIA H100'", "processes: 2 -> 4"]
    assert refused_changes(facts(), now) == []


def test_all_that_the_trainer_reads_of_an_architecture_is_compared():
    """`initializer_range` is of the first start only."""
    read = set()
    for path in (ROOT / "nvembed_mcore").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hf_config":
                read.add(node.attr)
    assert len(read) > 8
    assert read - {"to_dict", "initializer_range"} <= {*ARCHITECTURE}


def test_a_resume_tells_its_changes_before_it_loads(monkeypatch, caplog):
    """All refusals at once; and what may change, one line each."""
    saved = facts() | {"retain_tokens": None}
    monkeypatch.setattr(resume.store, "newest_good", lambda *arguments: Checkpoint(Path("run/step-5"), 5, saved))
    monkeypatch.setattr(resume.store, "load_checkpoint", lambda *arguments: None)
    now = changed("seed", 5)
    now["precision"] = "bfloat16"
    with pytest.raises(CheckpointError) as caught:
        resume.restore(CONFIG, [], None, now)
    assert str(caught.value) == (
        "run/step-5 belongs to another run; changed (saved -> now):\n"
        "  precision.dtype: 'float32' -> 'bfloat16'\n"
        "  seed: 1234 -> 5\n"
        "Set these back, or give a new run_dir"
    )
    now = changed("parallel.tp", 2)
    now["config"]["step"]["way"] = "cached"
    caplog.set_level(logging.INFO)
    assert resume.restore(CONFIG, [], None, now).step == 5
    assert caplog.messages == [
        "changed since step 5: parallel.tp: 1 -> 2",
        "changed since step 5: step.way: 'auto' -> 'cached'",
        "going on after step 5 from run/step-5",
    ]


def test_auto_must_and_never(monkeypatch, tmp_path, caplog):
    """Those of damaged checkpoints stand in the tests of the store."""

    def prepare(how: str, is_there: bool) -> None:
        monkeypatch.setattr(resume.store, "newest_step", lambda run_dir: 3 if is_there else None)
        checkpoint = dataclasses.replace(CONFIG.checkpoint, resume=how)
        config = dataclasses.replace(CONFIG, run_dir=str(tmp_path / "run"), checkpoint=checkpoint)
        _prepare_run_dir(config, SimpleNamespace(take=lambda: None))

    with pytest.raises(ConfigError) as caught:
        prepare("must", False)
    assert str(caught.value) == f"checkpoint.resume is 'must', but {tmp_path}/run has no complete checkpoint"
    with pytest.raises(ConfigError) as caught:
        prepare("never", True)
    assert str(caught.value) == f"checkpoint.resume is 'never', but {tmp_path}/run has a checkpoint of step 3"
    assert not (tmp_path / "run").exists(), "a run that was refused writes nothing"
    for how, is_there in (("auto", False), ("auto", True), ("must", True), ("never", False)):
        prepare(how, is_there)
    # A run that begins anew says so.
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(resume.store, "newest_good", lambda *arguments: None)
    assert resume.restore(CONFIG, [], None, facts()) is None
    assert caplog.messages == ["run has no checkpoint: the run starts at step 1"]


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    """A small one of the same kind as Mistral's: byte pairs, a leading space, special tokens by name."""
    pieces = ["<unk>", "<s>", "</s>", "_", "a", "b", "_a", "ab", "_ab"]
    merges = [("_", "a"), ("_a", "b"), ("a", "b")]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))  # noqa: S106
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("_"), normalizers.Replace(" ", "_")])
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")  # noqa: S106
    PreTrainedTokenizerFast(tokenizer_object=backend, padding_side="right", **names).save_pretrained(tmp_path / "t")
    return tmp_path / "t"


@pytest.mark.parametrize(
    ("file", "change", "matters"),
    [
        ("tokenizer.json", lambda content: content["model"]["merges"].pop(1), True),
        ("tokenizer.json", lambda content: content["model"]["merges"].append(content["model"]["merges"].pop(0)), True),
        ("tokenizer.json", lambda content: content["normalizer"]["normalizers"].pop(0), True),
        ("tokenizer_config.json", lambda content: content.update(eos_token="<unk>"), True),  # noqa: S106
        ("tokenizer_config.json", lambda content: content.update(bos_token="</s>"), True),  # noqa: S106
        ("tokenizer_config.json", lambda content: content.update(split_special_tokens=True), True),
        ("tokenizer_config.json", lambda content: content.update(padding_side="left"), False),
        ("tokenizer_config.json", lambda content: content.update(model_max_length=512), False),
        ("tokenizer_config.json", lambda content: content.update(chat_template="x"), False),
    ],
)
def test_a_tokenizer_is_known_by_the_ids_that_it_gives(tokenizer, file, change, matters):
    """Padding, lengths and templates are none of the trainer's: it makes no padding and cuts by itself."""
    before = load_tokenizer(tokenizer)
    content = json.loads((tokenizer / file).read_text(encoding="utf-8"))
    change(content)
    (tokenizer / file).write_text(json.dumps(content), encoding="utf-8")
    after = load_tokenizer(tokenizer)
    assert (tokenizer_fingerprint(before) != tokenizer_fingerprint(after)) == matters
