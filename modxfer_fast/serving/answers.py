"""Wire formats: how servers are asked for the K likeliest next tokens of a text, and how they say.

Position t of a text is answered by what stands at t + 1 of the reply: there a server tells what it
expected in place of that token. So no reply has the last position, which no token follows; nothing
is learnt there.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from modxfer_fast.config.model import SERVED_APIS
from modxfer_fast.serving.client import Request


class Listed(NamedTuple):
    """The K likeliest tokens behind each token of a text, likeliest first.

    Attributes:
        ids: [n, K] int32; -1 in the last row, which is not known.
        log_probs: [n, K] fp32, 0 there.
    """

    ids: Tensor
    log_probs: Tensor


class WireFormat(Protocol):
    """A way of asking. `read` and `tokens` raise ValueError, KeyError or TypeError of a reply that
    is another one."""

    more_classes: ClassVar[str | None]  # option of a server that tells more classes, if it has one

    def listed(self, model: str, texts: Sequence[list[int]], top_k: int) -> Request:
        """Asks for the likeliest tokens behind each one of some texts."""

    def read(self, reply: Any, texts: Sequence[list[int]], top_k: int) -> list[Listed]:
        """What it says, in the order of the texts."""

    def tokenised(self, model: str, text: str) -> Request:
        """Asks how the server cuts a text."""

    def tokens(self, reply: Any) -> list[int]:
        """The tokens that it says."""


class VLLM:
    """vLLM's /v1/completions: {"choices": [{"index", "prompt_logprobs": [null, {"<id>": {"logprob",
    "rank", "decoded_token"}, ...}, ...]}, ...]}. A position has its K likeliest tokens, ranks 1 to
    K, and its own token, which may rank below."""

    more_classes: ClassVar[str | None] = "--max-logprobs"

    def listed(self, model: str, texts: Sequence[list[int]], top_k: int) -> Request:
        body = {
            "model": model,
            "prompt": list(texts),
            "max_tokens": 1,  # none is refused
            "temperature": 0.0,
            "prompt_logprobs": top_k,
        }
        return Request("/v1/completions", body, _asked(texts, top_k))

    def read(self, reply: Any, texts: Sequence[list[int]], top_k: int) -> list[Listed]:
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        _expect("choices", len(texts), len(choices))
        return [
            self._of_text(choice["prompt_logprobs"], text, top_k)
            for choice, text in zip(choices, texts, strict=True)
        ]

    def _of_text(self, entries: list[Any], text: list[int], top_k: int) -> Listed:
        _expect("prompt_logprobs, one a token,", len(text), len(entries))
        ids, log_probs = [-1] * (len(text) * top_k), [0.0] * (len(text) * top_k)
        for place, (token, entry) in enumerate(zip(text[1:], entries[1:], strict=True)):
            _expect_token(str(token) in entry, token, place + 1)
            found = 0
            for key, value in entry.items():
                rank = value["rank"]
                if rank <= top_k:
                    ids[place * top_k + rank - 1] = int(key)
                    log_probs[place * top_k + rank - 1] = value["logprob"]
                    found += 1
            _expect(f"tokens behind token {place}", top_k, found)
        return _tensors(ids, log_probs, top_k)

    def tokenised(self, model: str, text: str) -> Request:
        body = {
            "model": model,
            "prompt": text,
            "max_tokens": 1,
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        return Request("/v1/completions", body, "the tokens of a text")

    def tokens(self, reply: Any) -> list[int]:
        return list(reply["choices"][0]["prompt_token_ids"])


class SGLang:
    """SGLang's /generate: [{"meta_info": {"input_token_logprobs": [[null, id, null], [logprob, id,
    null], ...], "input_top_logprobs": [null, [[logprob, id, null], ...], ...]}}, ...]."""

    more_classes: ClassVar[str | None] = None

    def listed(self, model: str, texts: Sequence[list[int]], top_k: int) -> Request:
        return Request(
            "/generate", self._body(top_k) | {"input_ids": list(texts)}, _asked(texts, top_k)
        )

    def _body(self, top_k: int) -> dict[str, Any]:
        return {
            "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": top_k,
            "return_text_in_logprobs": False,
        }

    def read(self, reply: Any, texts: Sequence[list[int]], top_k: int) -> list[Listed]:
        replies = reply if isinstance(reply, list) else [reply]
        _expect("replies", len(texts), len(replies))
        return [
            self._of_text(each["meta_info"], text, top_k)
            for each, text in zip(replies, texts, strict=True)
        ]

    def _of_text(self, info: dict[str, Any], text: list[int], top_k: int) -> Listed:
        own, entries = info["input_token_logprobs"], info["input_top_logprobs"]
        _expect("input_token_logprobs, one a token,", len(text), len(own))
        _expect("input_top_logprobs, one a token,", len(text), len(entries))
        ids, log_probs = [], []
        for place, (token, told, entry) in enumerate(
            zip(text[1:], own[1:], entries[1:], strict=True)
        ):
            _expect_token(told[1] == token, token, place + 1)
            _expect(f"tokens behind token {place}", top_k, len(entry))
            for log_prob, key, _ in entry:
                ids.append(key)
                log_probs.append(log_prob)
        return _tensors(ids + [-1] * top_k, log_probs + [0.0] * top_k, top_k)

    def tokenised(self, model: str, text: str) -> Request:
        return Request("/generate", self._body(1) | {"text": text}, "the tokens of a text")

    def tokens(self, reply: Any) -> list[int]:
        each = reply[0] if isinstance(reply, list) else reply
        return [token for _, token, _ in each["meta_info"]["input_token_logprobs"]]


_FORMATS: tuple[WireFormat, ...] = (VLLM(), SGLang())
FORMATS = dict(zip(SERVED_APIS, _FORMATS, strict=True))


def _asked(texts: Sequence[list[int]], top_k: int) -> str:
    tokens = sum(map(len, texts))
    return f"the {top_k} likeliest tokens behind each of {tokens:,} in {len(texts):,} documents"


def _expect(what: str, expected: int, got: int) -> None:
    if got != expected:
        raise ValueError(f"expected {expected} {what} got {got}")


def _expect_token(is_there: bool, token: int, place: int) -> None:
    if not is_there:
        raise ValueError(f"expected token {token} at place {place}, got the answer to another text")


def _tensors(ids: list[int], log_probs: list[float], top_k: int) -> Listed:
    shape = -1, top_k
    return Listed(
        torch.tensor(ids, dtype=torch.int32).view(shape),
        torch.tensor(log_probs, dtype=torch.float32).view(shape),
    )
