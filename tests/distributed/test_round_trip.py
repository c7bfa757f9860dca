"""Hugging Face -> Megatron -> Hugging Face, not a bit changed, in every layout; through a run and import-hf."""

import shutil

import pytest
import torch
import yaml
from transformers import MistralConfig

from nvembed_mcore.checkpoint.names import name_table
from nvembed_mcore.config import ParallelConfig, PoolingConfig
from nvembed_mcore.resume import plain
from tests.helpers import runs, transfer
from tests.helpers.models import tiny_config

LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
KINDS = ["latent", "self_attention", "mean", "last", "multi_layer"]
MODELS = [
    *(("latent", "float32"), ("latent", "bfloat16"), ("self_attention", "bfloat16"), ("mean", "float32")),
    *(("last", "bfloat16"), ("multi_layer", "float32")),
]
CONFIG = tiny_config(num_hidden_layers=2)
STATES, EMBEDDINGS = 2e-6, 2e-6


def pooling_of(kind):
    return PoolingConfig(kind=kind, num_latents=6, num_heads=4, head_width=12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(kind, dtype) -> folder and the tensors in it."""
    root, made = tmp_path_factory.mktemp("folders"), {}
    for kind, dtype in [*MODELS, ("self_attention", "float32"), ("last", "float32")]:
        path = root / f"{kind}-{dtype}"
        made[kind, dtype] = path, transfer.write_folder(path, CONFIG, pooling_of(kind), getattr(torch, dtype))
    return made


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def assert_exported(checkpoint, output, kind, dtype, tensors):
    transfer.export_weights(checkpoint, output, CONFIG, pooling_of(kind), getattr(torch, dtype))
    assert_same(transfer.tensors_of(output), tensors)


TO_ALL = [pytest.param(*one, marks=[pytest.mark.slow] if one == (2, 2) else []) for one in LAYOUTS]


@pytest.mark.parametrize(("tp", "pp"), TO_ALL)
def test_through_a_run_and_its_checkpoint(world, folders, tmp_path, tp, pp):
    jobs = [
        (folders[kind, dtype][0], tmp_path / f"{kind}-{dtype}", pooling_of(kind), dtype, tp, pp)
        for kind, dtype in MODELS
    ]
    for missing in world(tp * pp).run(transfer.many, transfer.import_and_save, jobs):
        assert not any(missing)
    for kind, dtype in MODELS:
        saved = tmp_path / f"{kind}-{dtype}"
        assert_exported(saved, tmp_path / f"{saved.name}-back", kind, dtype, folders[kind, dtype][1])


@pytest.mark.parametrize(("tp", "pp"), TO_ALL)
def test_through_import_hf(world, folders, tmp_path, tp, pp):
    """As many ranks share the import as load what it wrote; one process exports it."""
    imports, loads = [], []
    for kind, dtype in MODELS:
        folder, checkpoint = folders[kind, dtype][0], tmp_path / f"{kind}-{dtype}"
        imports.append((folder, checkpoint))
        loads.append((checkpoint, folder, pooling_of(kind), dtype, tp, pp))
    for results in world(tp * pp).run(transfer.many, transfer.imported, imports):
        for done, model in zip(results, MODELS, strict=True):
            tensors = folders[model][1]
            assert done.num_tensors == len(tensors)
            assert done.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    for different in world(tp * pp).run(transfer.many, transfer.load_and_compare, loads):
        assert not any(different), different
    for kind, dtype in MODELS:
        saved = tmp_path / f"{kind}-{dtype}"
        assert_exported(saved, tmp_path / f"{saved.name}-back", kind, dtype, folders[kind, dtype][1])


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_an_imported_model_computes_what_hugging_face_s_does(world, folders, tp, pp):
    jobs = [(folders[kind, "float32"][0], pooling_of(kind), 4, tp, pp) for kind in KINDS]
    results = [result for rank in world(tp * pp).run(transfer.many, transfer.parity, jobs) for result in rank]
    assert sum(bool(result) for result in results) == len(KINDS) * tp
    for result in results:
        assert result.get("states", 0.0) <= STATES and result.get("embeddings", 0.0) <= EMBEDDINGS


def test_dtypes_are_converted_tensor_by_tensor(world, folders, tmp_path):
    """A folder in bfloat16 fills an encoder in float32, and `--dtype` writes another one than is stored."""
    folder, tensors = folders["latent", "bfloat16"]
    world(1).run(transfer.imported, folder, tmp_path / "wide", "float32")
    (different,) = world(1).run(
        transfer.load_and_compare, tmp_path / "wide", folder, pooling_of("latent"), "float32", 1, 1
    )
    assert not different
    transfer.export_weights(tmp_path / "wide", tmp_path / "back", CONFIG, pooling_of("latent"), torch.float32)
    assert_same(transfer.tensors_of(tmp_path / "back"), {name: one.float() for name, one in tensors.items()})


@pytest.mark.parametrize("name", ["latent_attention_model.latents", "embedding_model.layers.0.mlp.up_proj.weight"])
def test_numbers_of_one_rank_that_are_not_finite_end_every_rank(world, tmp_path, name):
    """What one rank finds must not leave the others waiting, in an import or in a run."""
    folder, config = tmp_path / "folder", tiny_config(num_hidden_layers=2, vocab_size=32000)
    tensors = transfer.write_folder(folder, config, pooling_of("latent"), torch.float32)
    transfer.write_shards(folder, tensors | {name: tensors[name] * float("nan")}, 2)
    assert world(2).run(transfer.command, ["import-hf", str(folder), str(tmp_path / "out")]) == [78, 78]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder"]
    inputs = runs.write_inputs(tmp_path / "inputs")
    tree = plain(runs.run_config(inputs, tmp_path / "run", parallel=ParallelConfig(pp=2)))
    tree["model"] |= {"config": None, "init_from": str(folder)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    assert world(2).run(transfer.command, ["train", str(tmp_path / "run.yaml")]) == [78, 78]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# True sizes, in bfloat16

MISTRAL = MistralConfig(
    num_hidden_layers=2, vocab_size=32000, sliding_window=None
)  # the other defaults are Mistral-7B's
LARGE_LAYOUTS = [(1, 1), (2, 1), (1, 2), (2, 2)]
SECONDS = 600


@pytest.fixture(scope="module")
def large_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "nv-embed"
    transfer.write_folder(path, MISTRAL, PoolingConfig(), torch.bfloat16)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def room(tmp_path):
    """A folder that is emptied at once: pytest would keep some gigabytes of each test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def assert_same_files(found, expected):
    """Tensor by tensor: two models of this size need not fit into memory."""
    from safetensors import safe_open

    from nvembed_mcore.checkpoint.hf_folder import read_headers

    here, there = read_headers(found), read_headers(expected)
    assert here.keys() == there.keys()
    for name in there:
        tensors = []
        for folder, headers in ((found, here), (expected, there)):
            with safe_open(folder / headers[name].file, framework="pt") as file:
                tensors.append(file.get_tensor(name))
        assert tensors[0].dtype == tensors[1].dtype and torch.equal(*tensors), name


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), LARGE_LAYOUTS)
def test_true_shapes_through_a_run(world, large_folder, room, tp, pp):
    assert {(4096, 14336), (65536, 4096), (512, 4096), (32000, 4096)} <= {
        shape for entry in name_table(MISTRAL, PoolingConfig()) for shape in entry.hf.values()
    }
    saved = room / "saved"
    world(tp * pp).run(
        transfer.import_and_save, large_folder, saved, PoolingConfig(), "bfloat16", tp, pp, timeout_seconds=SECONDS
    )
    transfer.export_weights(saved, room / "back", MISTRAL, PoolingConfig(), torch.bfloat16)
    assert_same_files(room / "back", large_folder)


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), LARGE_LAYOUTS)
def test_true_shapes_through_import_hf(world, large_folder, room, tp, pp):
    saved = room / "saved"
    world(tp * pp).run(transfer.imported, large_folder, saved, timeout_seconds=SECONDS)
    for different in world(tp * pp).run(
        transfer.load_and_compare,
        saved,
        large_folder,
        PoolingConfig(),
        "bfloat16",
        tp,
        pp,
        timeout_seconds=SECONDS,
    ):
        assert not different
    transfer.export_weights(saved, room / "back", MISTRAL, PoolingConfig(), torch.bfloat16)
    assert_same_files(room / "back", large_folder)
