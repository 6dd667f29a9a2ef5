"""JSON over HTTP to a server of models: so many requests at a time, tried again, never for ever."""

import errno
import http.client
import json
import logging
import os
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult, urlsplit

from modxfer_fast.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
# how a server is missed that starts again: nobody there, or a proxy that says so
_AWAY = (errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH)
_AWAY_STATUSES = (502, 503, 504)
_PASSING = (408, 425, 429, 500, *_AWAY_STATUSES)  # statuses that may pass
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_SHOWN = 400  # characters of a reply in a message


class ServerError(UserError):
    """A server that cannot be reached, refuses, or answers something else than was asked.

    Attributes:
        status: with which it refused, at once or in the last try; None where it did not.
    """

    status: int | None = None


class Request(NamedTuple):
    """One question.

    Attributes:
        path: below the server's address.
        body: sent as JSON by POST; None for a GET.
        asked: what it asks for, for messages.
        decode: of the text of the reply; raises ValueError of one that is not whole.
    """

    path: str
    body: dict[str, Any] | None
    asked: str
    decode: Callable[[str], Any] = json.loads


class Server:
    """A server, to which connections are kept.

    Args:
        url: http or https; an ending /v1 is left out, because paths say it.
        timeout_s: of one try, from the connection to the last byte of the reply.
        retries: tries beside the first of a request that met a passing fault: a connection that
            broke, a timeout, a reply cut short, or a status that may pass. Pauses between them
            double, from half a second to half a minute, or are what the server asks for, at most
            `timeout_s`. Tries that find nobody there, as while a server starts, are not counted,
            unless there is none.
        retry_s: no try of a request begins later than so many seconds after its first one, so that
            it has an answer, or fails, within `retry_s` and `timeout_s`.
        max_in_flight: requests at a time of this process; others wait here.
        api_key: sent as a bearer token.

    Raises:
        ServerError: no such url, or a key that no header can hold.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 120.0,
        retries: int = 5,
        retry_s: float = 300.0,
        max_in_flight: int = 8,
        api_key: str | None = None,
    ):
        self.url = url.rstrip("/").removesuffix("/v1")
        parts = _parts_of(self.url)
        if parts is None:
            raise ServerError(f"url: expected http://HOST:PORT or https://HOST, got {url}")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
            raise ServerError("api_key: expected printable characters of ASCII, got others")
        self.timeout_s, self.retries, self.retry_s = timeout_s, retries, retry_s
        self.max_in_flight = max_in_flight
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self.processes = 1  # that share max_in_flight, as workers of a loader do
        self._parts = parts
        self._is_missed = False
        self._threads: _Threads | None = None

    def __getstate__(self) -> dict[str, Any]:  # threads and connections stay where they are
        return {**self.__dict__, "_threads": None}

    def ask(self, request: Request) -> Any:
        """The decoded reply to a request.

        Raises:
            ServerError: it refuses, or no try brought a whole reply.
        """
        return self.submit(request).result()

    def submit(self, request: Request, read: Callable[[Any], Any] = lambda reply: reply) -> Future:
        """What `read` makes of the reply, when it is there; requests start in the order given."""
        if self._threads is None or self._threads.pid != os.getpid():  # a forked one has no threads
            number = max(self.max_in_flight // self.processes, 1)
            self._threads = _Threads(number, lambda: _Connection(self._parts))
            weakref.finalize(self, self._threads.end).atexit = False
        return self._threads.submit(lambda connection: read(self._answer(connection, request)))

    def fault(self, request: Request, what: str, status: int | None = None) -> ServerError:
        """An error that says where, what was asked, and what came."""
        error = ServerError(f"{self.url}{request.path}: asked for {request.asked}; {what}")
        error.status = status
        return error

    def decoded(self, request: Request, reply: Any, read: Callable[[Any], T]) -> T:
        """What `read` makes of a reply.

        Raises:
            ServerError: it is another reply than was asked for, of which `read` can make nothing.
        """
        try:
            return read(reply)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            said = str(error) if isinstance(error, ValueError) else repr(error)
            raise self.fault(request, f"another reply came: {said}") from error

    def _answer(self, connection: "_Connection", request: Request) -> Any:
        data = None if request.body is None else json.dumps(request.body).encode()
        method = "GET" if data is None else "POST"
        jitter = random.Random()  # not the one that training draws from
        pause, begin = _FIRST_PAUSE_S, time.monotonic()
        tries, left = 0, self.retries
        while True:
            tries += 1
            status = wait = None
            is_away = False
            try:
                status, wait, reply = connection.exchange(
                    method, request.path, data, self._headers, self.timeout_s
                )
            except (OSError, http.client.HTTPException) as error:
                came = f"{type(error).__name__}: {error}".rstrip(": ")
                is_away = isinstance(error, OSError) and error.errno in _AWAY
            else:
                text = reply.decode(errors="replace")
                if status == 200:
                    self._is_missed = False
                    try:
                        return request.decode(text)
                    except ValueError as error:
                        came = f"a reply that is no whole JSON ({error}): {_short(text)}"
                else:
                    came = f"status {status}: {_short(text)}"
                    if status not in _PASSING:
                        raise self.fault(request, f"it refused with {came}", status)
                    is_away = status in _AWAY_STATUSES
            drawn = pause * jitter.uniform(0.5, 1.0) if wait is None else min(wait, self.timeout_s)
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            if is_away and self.retries:
                is_told, self._is_missed = self._is_missed, True
                if not is_told:
                    logger.warning(f"{self.url}: {came}; tried again for {self.retry_s:g} s")
            elif left:
                left -= 1
            else:
                break
            if time.monotonic() - begin + drawn > self.retry_s:
                break
            time.sleep(drawn)
        times = f"{tries} {'try' if tries == 1 else 'tries'}"
        raise self.fault(request, f"no answer in {times}: {came}", status)


def _parts_of(url: str) -> SplitResult | None:
    """The parts of an address, None of what is none."""
    try:
        parts = urlsplit(url)
        is_one = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, or too large
        return None
    return parts if is_one else None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class _Connection:
    """One at a time, kept open between requests; of one thread."""

    def __init__(self, parts: Any):
        self._parts = parts
        self._open: http.client.HTTPConnection | None = None

    def exchange(
        self,
        method: str,
        path: str,
        data: bytes | None,
        headers: dict[str, str],
        timeout_s: float,
    ) -> tuple[int, float | None, bytes]:
        """Status, the pause in seconds that the server asks for, and the body."""
        deadline = time.monotonic() + timeout_s
        was_open = self._open is not None
        try:
            return self._exchange(method, path, data, headers, deadline)
        except (http.client.RemoteDisconnected, ConnectionError):
            self.close()
            if not was_open:
                raise
        except BaseException:
            self.close()
            raise
        # a server closes what nothing came over for a while
        try:
            return self._exchange(method, path, data, headers, deadline)
        except BaseException:
            self.close()
            raise

    def _exchange(
        self,
        method: str,
        path: str,
        data: bytes | None,
        headers: dict[str, str],
        deadline: float,
    ) -> tuple[int, float | None, bytes]:
        if self._open is None:
            secure = self._parts.scheme == "https"
            kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            self._open = kind(self._parts.hostname, self._parts.port)
        self._open.timeout = _left(deadline)
        if self._open.sock is not None:
            self._open.sock.settimeout(self._open.timeout)
        self._open.request(method, self._parts.path + path, data, headers)
        reply = self._open.getresponse()
        body = bytearray()
        while chunk := reply.read1(1 << 20):
            body += chunk
            if self._open.sock is not None:
                self._open.sock.settimeout(_left(deadline))
        if reply.length:  # bytes that were promised
            raise http.client.IncompleteRead(bytes(body), reply.length)
        reply.close()  # else the connection takes no other request
        if reply.will_close:
            self.close()
        wait = reply.getheader("Retry-After")
        return reply.status, float(wait) if wait and wait.isdigit() else None, bytes(body)

    def close(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


def _left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("timed out")
    return seconds


class _Threads:
    """Workers that end with the process, whatever they wait for: a pool of `concurrent.futures`
    would keep a job that failed from ending until its server answers. `end` ends them before."""

    def __init__(self, number: int, connect: Callable[[], _Connection]):
        self.pid = os.getpid()
        self._waiting: queue.SimpleQueue = queue.SimpleQueue()
        self._number = number
        for index in range(number):
            work = threading.Thread(
                target=self._work, args=(connect(),), name=f"server-{index}", daemon=True
            )
            work.start()

    def submit(self, act: Callable[[_Connection], Any]) -> Future:
        future: Future = Future()
        self._waiting.put((future, act))
        return future

    def end(self) -> None:
        """Each ends, and closes its connection, when nothing waits."""
        for _ in range(self._number):
            self._waiting.put(None)

    def _work(self, connection: _Connection) -> None:
        while (item := self._waiting.get()) is not None:
            future, act = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(act(connection))
                except BaseException as error:
                    future.set_exception(error)
            del item, future, act
        connection.close()
