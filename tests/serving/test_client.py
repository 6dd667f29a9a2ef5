"""Requests to a server: tried again where a fault may pass, told where not, bounded, in order."""

import errno
import gc
import http.client
import itertools
import pickle
import socket
import threading
import time

import pytest

from modxfer_fast.serving import Server, ServerError
from modxfer_fast.serving import client as module
from modxfer_fast.serving.client import Request
from tests.support.model_server import ModelServer, serving
from tests.support.models import tiny_llama

TEXT = [5, 6, 7]


def request(text=TEXT, **fields):
    body = {"model": "tiny", "prompt": [text], "max_tokens": 1, "prompt_logprobs": 2, **fields}
    return Request("/v1/completions", body, "a thing")


@pytest.fixture
def own():
    return ModelServer(tiny_llama())


@pytest.fixture
def url(own, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_PAUSE_S", 0.01)
    with serving(own) as url:
        yield url


@pytest.mark.parametrize("fault", [500, 503, 429, "reset", "truncated", "cut"])
def test_a_fault_that_passes_is_tried_again(own, url, fault):
    own.faults = [fault, fault]
    reply = Server(url, retries=2).ask(request())
    assert len(reply["choices"][0]["prompt_logprobs"]) == len(TEXT)
    assert len(own.requests) == 3
    assert own.requests[0] == own.requests[2]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (500, "status 500: .*engine is not ready"),
        ("reset", "ConnectionResetError|RemoteDisconnected"),
        ("truncated", "IncompleteRead"),
        ("cut", "no whole JSON"),
    ],
)
def test_one_that_stays_is_told(own, url, fault, told):
    own.faults = [fault] * 3
    with pytest.raises(ServerError, match=told) as caught:
        Server(url, retries=2).ask(request())
    message = str(caught.value)
    assert message.startswith(f"{url}/v1/completions: asked for a thing; no answer in 3 tries: ")


@pytest.mark.parametrize("fault", ["hang", "drip"])
def test_a_server_that_hangs_is_left(own, url, fault):
    own.faults = [fault]
    begin = time.monotonic()
    with pytest.raises(ServerError, match="no answer in 1 try: TimeoutError: timed out"):
        Server(url, retries=0, timeout_s=0.5).ask(request())
    assert time.monotonic() - begin < 10


def test_a_try_behind_one_that_hung_gets_its_own_answer(own, url):
    own.faults = ["hang"]
    server = Server(url, retries=1, timeout_s=1.0, max_in_flight=1)
    futures = [server.submit(request(text)) for text in ([5, 6], [7, 8, 9])]
    lengths = [len(f.result()["choices"][0]["prompt_logprobs"]) for f in futures]
    assert lengths == [2, 3]


def test_a_refusal_is_told_at_once(own, url):
    with pytest.raises(ServerError, match=r"refused with status 404: .*`other` does not exist"):
        Server(url).ask(request(model="other"))
    assert len(own.requests) == 1


def test_nobody_there():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerError, match="no answer in 1 try: ConnectionRefusedError"):
        Server(url, retries=0).ask(request())


def test_a_pause_that_the_server_asks_for_is_kept(monkeypatch, own, url):
    paused = []
    monkeypatch.setattr(module.time, "sleep", paused.append)
    answers = iter([(503, 7.0, b"later"), (503, 86400.0, b"tomorrow"), (200, None, b"{}")])
    monkeypatch.setattr(module._Connection, "exchange", lambda *_: next(answers))
    assert Server(url, retries=2, timeout_s=9.0).ask(request()) == {}
    assert paused == [7.0, 9.0]


class Clock:
    """Time that passes while one sleeps."""

    def __init__(self, patch):
        self.now, self.paused = 0.0, []
        patch.setattr(module.time, "sleep", self.sleep)
        patch.setattr(module.time, "monotonic", lambda: self.now)

    def sleep(self, seconds):
        self.paused.append(seconds)
        self.now += seconds


def answers_of(monkeypatch, answers):
    """Each next try gets the next one: raised, or returned."""

    def exchange(*_):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(module._Connection, "exchange", exchange)


def test_pauses_grow_and_end(monkeypatch):
    clock = Clock(monkeypatch)
    answers_of(monkeypatch, itertools.repeat(TimeoutError("timed out")))
    with pytest.raises(ServerError, match="10 tries: TimeoutError: timed out"):
        Server("http://127.0.0.1:1", retries=9).ask(request())
    tops = [min(0.5 * 2**n, 30.0) for n in range(9)]
    assert len(clock.paused) == 9
    assert all(top / 2 <= pause <= top for pause, top in zip(clock.paused, tops, strict=True))


REFUSED = ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")


@pytest.mark.parametrize("away", [REFUSED, (503, None, b"loading"), (502, 20.0, b"bad gateway")])
def test_a_server_that_starts_again_is_waited_for(monkeypatch, caplog, away):
    clock = Clock(monkeypatch)

    def answers():
        yield http.client.RemoteDisconnected("gone")
        while clock.now < 120:
            yield away
        yield 200, None, b"[]"

    answers_of(monkeypatch, answers())
    server = Server("http://127.0.0.1:1", retries=2)
    assert server.ask(request()) == []
    assert clock.now < 120 + 30
    assert len([line for line in caplog.messages if "tried again for 300 s" in line]) == 1


def test_one_that_stays_away_is_told(monkeypatch):
    clock = Clock(monkeypatch)
    answers_of(monkeypatch, itertools.repeat(REFUSED))
    with pytest.raises(ServerError, match=r"no answer in \d+ tries: ConnectionRefusedError"):
        Server("http://127.0.0.1:1", retries=1, retry_s=60.0).ask(request())
    assert 30 < clock.now <= 60


def test_no_try_begins_too_late(monkeypatch):
    clock = Clock(monkeypatch)

    def hang(*_):
        clock.now += 120.0
        raise TimeoutError("timed out")

    monkeypatch.setattr(module._Connection, "exchange", hang)
    with pytest.raises(ServerError, match="no answer in 3 tries: TimeoutError"):
        Server("http://127.0.0.1:1", retries=9, timeout_s=120.0, retry_s=300.0).ask(request())
    assert clock.now <= 300 + 120


def test_no_more_than_allowed_are_in_flight(own, url):
    own.delay_s = 0.05
    server = Server(url, max_in_flight=3)
    futures = [server.submit(request([5] * (2 + n))) for n in range(10)]
    lengths = [len(f.result()["choices"][0]["prompt_logprobs"]) for f in futures]
    assert lengths == [2 + n for n in range(10)]
    assert len(own.requests) == 10
    assert 1 < own.most_at_once <= 3


def test_processes_share_what_may_be_in_flight(own, url):
    own.delay_s = 0.05
    server = Server(url, max_in_flight=3)
    server.processes = 2
    for future in [server.submit(request()) for _ in range(4)]:
        future.result()
    assert own.most_at_once == 1


def test_a_connection_that_the_server_closed_costs_no_try(own, url):
    server = Server(url, retries=0, max_in_flight=1)
    server.ask(request())
    own.faults = [None, "reset"]
    server.ask(request())
    # the third meets a reset on a kept connection, and a fresh one
    server.ask(request())
    assert len(own.requests) == 4


def test_the_key_is_sent(own, url):
    own.key = "secret"
    with pytest.raises(ServerError, match="refused with status 401"):
        Server(url).ask(request())
    assert Server(url, api_key="secret").ask(request())["choices"]


@pytest.mark.parametrize("key", ["of a file\n", "ключ"])
def test_a_key_that_cannot_be_sent(key):
    with pytest.raises(ServerError, match="api_key: expected printable characters of ASCII"):
        Server("http://host", api_key=key)


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/"])
def test_addresses_with_and_without_v1(url, ending):
    assert Server(url + ending).url == url


@pytest.mark.parametrize(
    "bad", ["localhost:8000", "ftp://host", "http://", "http://host:80a", "http://host:99999"]
)
def test_what_is_no_address(bad):
    with pytest.raises(ServerError, match="url: expected http://HOST:PORT"):
        Server(bad)


def test_another_process_gets_threads_of_its_own(url):
    server = Server(url)
    server.ask(request())
    again = pickle.loads(pickle.dumps(server))
    assert again.ask(request())["choices"]
    assert sum("server-" in thread.name for thread in threading.enumerate()) >= 16


def test_threads_and_connections_end_with_their_server(own, url, monkeypatch):
    closed = []
    close = module._Connection.close
    monkeypatch.setattr(module._Connection, "close", lambda c: (closed.append(c), close(c)))
    before = set(threading.enumerate())
    server = Server(url, max_in_flight=3)
    server.ask(request())
    threads = set(threading.enumerate()) - before
    ours = [thread for thread in threads if "server-" in thread.name]
    assert len(ours) == 3
    del server
    gc.collect()
    for thread in ours:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in ours)
    assert len(closed) == 3
