"""An ONNX export says in onnxruntime what the trainer says, for every pooling; what cannot be written is refused."""

import numpy as np
import pytest

from examples.serving.onnx_encoder import OnnxEncoder
from nvembed_mcore.checkpoint import onnx_export
from nvembed_mcore.checkpoint.hf_export import ExportError
from nvembed_mcore.checkpoint.hf_folder import WeightsError
from nvembed_mcore.checkpoint.onnx_export import export_onnx
from nvembed_mcore.cli import main
from tests.helpers.exports import INSTRUCTION, KINDS, TEXTS


def cosines(found, expected):
    return (found.astype(np.float64) * expected.double().numpy()).sum(-1)


SLOW = {"self_attention", "multi_layer", "last"}  # latent has the most of what a graph can be wrong in


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind in SLOW else []) for kind in KINDS if kind != "mean"]
)
def test_equals_the_trainer(cases, kind, tmp_path):
    case = cases[kind]
    done = export_onnx(case.folder, tmp_path / "onnx")
    assert done.cosine >= 0.9999
    encoder = OnnxEncoder(tmp_path / "onnx")
    for prompt_name, instruction in (("document", ""), ("query", INSTRUCTION)):
        # In batches of other sizes and lengths than the graph was recorded with.
        for batch_size in (1, 5):
            found = encoder.encode(TEXTS, prompt_name, batch_size)
            assert cosines(found, case.expected(TEXTS, instruction)).min() >= 0.9999, (prompt_name, batch_size)
    assert cosines(encoder.encode(TEXTS), case.expected(TEXTS, INSTRUCTION)).min() < 0.999  # the prompt matters


def test_a_plain_mistral_in_half_precision(cases, tmp_path, capsys):
    cases["mean"].export(tmp_path / "mean", format="mean")
    assert main(["export-onnx", str(tmp_path / "mean"), str(tmp_path / "onnx"), "--dtype", "float16"]) == 0
    assert "cosine at least 0.999" in capsys.readouterr().out
    assert (tmp_path / "onnx/model.onnx.data").stat().st_size < (tmp_path / "mean/model.safetensors").stat().st_size
    encoder = OnnxEncoder(tmp_path / "onnx")
    assert cosines(encoder.encode(TEXTS, "query"), cases["mean"].expected(TEXTS, INSTRUCTION)).min() > 0.999
    encoder.limit = 12
    with pytest.raises(ValueError, match="of 12 tokens and leaves no room"):
        encoder.encode(["x"], "query")


def test_what_is_refused_leaves_nothing(cases, tmp_path, monkeypatch):
    folder = cases["mean"].folder
    with pytest.raises(ExportError, match="float32, float16 for ONNX, got 'bfloat16'"):
        export_onnx(folder, tmp_path / "onnx", dtype="bfloat16")
    with pytest.raises(ExportError, match="exists"):
        export_onnx(folder, tmp_path)
    with pytest.raises(WeightsError, match="config.json"):
        export_onnx(tmp_path, tmp_path / "onnx")
    monkeypatch.setitem(onnx_export.LEAST_COSINE, "float32", 1.1)
    with pytest.raises(ExportError, match=r"differ on .*mean: cosine [01]\.\d+ < 1.1"):
        export_onnx(folder, tmp_path / "onnx")
    assert list(tmp_path.iterdir()) == []
