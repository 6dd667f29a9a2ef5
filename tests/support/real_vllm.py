"""A real vLLM on a CPU, where MODXFER_VLLM names a Python that has one (docs/cluster.md)."""

import os
import socket
import subprocess
import time
from contextlib import contextmanager

import pytest

from modxfer_fast.serving import Server, ServerError, check_served
from tests.support.servable import MAX_LENGTH

PYTHON = os.environ.get("MODXFER_VLLM")
START_S = 900.0
marks = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="MODXFER_VLLM names no Python that has vLLM"),
]


@contextmanager
def real_vllm(folder, *more, **variables):
    """The address of a server of the model in `folder`/tiny, as `tiny`, that runs meanwhile."""
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
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *more]
    command += [str(part) for pair in options.items() for part in pair]
    variables |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    with log.open("wb") as file:
        server = subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        wait_for(url, server, log)
        yield url
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
            check_served(Server(url, retries=0), "tiny", MAX_LENGTH, "a text")
            return
        except ServerError:
            time.sleep(1.0)
    pytest.fail(f"vLLM did not start: {log.read_text()[-3000:]}")
