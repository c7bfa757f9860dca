"""The example server of an export answers as OpenAI's endpoint does, with the vectors of the export."""

import base64
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest

from tests.helpers.exports import INSTRUCTION, TEXTS


@pytest.fixture(scope="module")
def server(cases, tmp_path_factory):
    """Its address."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "examples/serving/openai_embeddings.py", str(cases["latent"].folder)]
    command += ["--name", "tiny", "--port", str(port), "--accelerator", "cpu", "--trust-remote-code"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(log.parent)}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        until = time.monotonic() + 120
        while not is_ready(address):
            assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
            time.sleep(0.3)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def is_ready(address):
    try:
        return httpx.get(f"{address}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def ask(address, **request):
    """Status and answer."""
    answer = httpx.post(f"{address}/v1/embeddings", json=request, timeout=60)
    return answer.status_code, answer.json()


@pytest.mark.parametrize("model, instruction", [("tiny", ""), ("tiny-passage", ""), ("tiny-query", INSTRUCTION)])
def test_vectors_are_those_of_the_export(server, cases, model, instruction):
    status, answer = ask(server, model=model, input=TEXTS)
    assert status == 200 and answer["object"] == "list" and answer["model"] == model
    assert [one["index"] for one in answer["data"]] == list(range(len(TEXTS)))
    found = np.array([one["embedding"] for one in answer["data"]])
    assert (found * cases["latent"].expected(TEXTS, instruction).double().numpy()).sum(-1).min() > 0.99999
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] > len(TEXTS)


def test_one_text_fewer_dimensions_and_base64(server):
    _, whole = ask(server, model="tiny", input="a text")
    _, part = ask(server, model="tiny", input="a text", dimensions=8)
    _, packed = ask(server, model="tiny", input="a text", encoding_format="base64")
    whole, part = (np.array(answer["data"][0]["embedding"]) for answer in (whole, part))
    np.testing.assert_allclose(part, whole[:8] / np.linalg.norm(whole[:8]), atol=1e-6)
    decoded = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), dtype="<f4")
    np.testing.assert_allclose(decoded, whole, atol=1e-6)
    models = httpx.get(f"{server}/v1/models", timeout=10).json()["data"]
    assert [one["id"] for one in models] == ["tiny", "tiny-passage", "tiny-query"]


@pytest.mark.parametrize(
    "request_, status, words",
    [
        ({"model": "gpt", "input": "x"}, 404, "no model 'gpt' here; there are tiny, tiny-passage, tiny-query"),
        ({"model": "tiny", "input": ["x", " "]}, 400, "input 1 is blank"),
        ({"model": "tiny", "input": []}, 400, "a text or a list of texts"),
        ({"model": "tiny", "input": [1, 2]}, 400, "token ids are not taken"),
        ({"model": "tiny", "input": "x", "dimensions": 33}, 400, "between 1 and 32, got 33"),
    ],
)
def test_bad_requests_are_explained(server, request_, status, words):
    found, answer = ask(server, **request_)
    assert found == status and words in answer["error"]["message"]
    assert answer["error"]["type"] == "invalid_request_error"
