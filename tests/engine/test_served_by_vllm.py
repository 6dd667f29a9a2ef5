"""A real vLLM on a CPU answers as the model does here.

MODXFER_VLLM names a Python that has vLLM (docs/cluster.md says how one is made).
"""

import os
import socket
import subprocess
import time

import pytest
import torch

from modxfer_fast.serving import FORMATS, ListedAnswers, Server, ServerError
from modxfer_fast.teacher_cache import documents_of
from tests.support.servable import MAX_LENGTH, save_servable, servable_tokenizer

PYTHON = os.environ.get("MODXFER_VLLM")
TOP_K = 20
START_S = 900.0
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="MODXFER_VLLM names no Python that has vLLM"),
]


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """Address of a server, and the model that it serves."""
    folder = tmp_path_factory.mktemp("vllm")
    model = save_servable(folder / "tiny")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = {
        "--model": folder / "tiny",
        "--served-model-name": "tiny",
        "--dtype": "float32",
        "--max-model-len": MAX_LENGTH,
        "--port": port,
        "--host": "127.0.0.1",
    }
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
    command += [str(part) for pair in options.items() for part in pair]
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        wait_for(url, server, log)
        yield url, model
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()


def wait_for(url, server, log):
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            asking(url, 1)._check_model(MAX_LENGTH - 1)
            return
        except ServerError:
            time.sleep(1.0)
    pytest.fail(f"vLLM did not start: {log.read_text()[-3000:]}")


def asking(url, top_k, classes=400):
    server = Server(url, retries=0)
    return ListedAnswers(
        server, FORMATS["vllm"], "tiny", classes=classes, top_k=top_k, request_tokens=200
    )


def test_served_classes_are_those_of_the_model_here(vllm):
    url, model = vllm
    tokenizer = servable_tokenizer()
    source, text = asking(url, TOP_K, len(tokenizer)), "def yield Größe"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    source.check(text, ids, len(tokenizer) - 1, MAX_LENGTH - 1)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, len(tokenizer), (6, 60), generator=generator)
    for document, listed in source.ask(documents_of(rows)):
        with torch.no_grad():
            logits = model(input_ids=document.ids[None].long()).logits[0, :-1]
        expected = logits.double().log_softmax(-1)
        told = expected.gather(-1, listed.ids[:-1].long())
        torch.testing.assert_close(listed.log_probs[:-1].double(), told, rtol=0, atol=1e-4)
        best = expected.topk(TOP_K).values
        torch.testing.assert_close(listed.log_probs[:-1].double(), best, rtol=0, atol=1e-4)


def test_more_classes_than_it_tells_are_told(vllm):
    tokenizer = servable_tokenizer()
    ids = tokenizer("def", add_special_tokens=False)["input_ids"]
    source = asking(vllm[0], 21, len(tokenizer))
    with pytest.raises(ServerError, match="start the server with --max-logprobs 21"):
        source.check("def", ids, len(tokenizer) - 1, 100)
