"""A base behind vLLM, and adapters of it that are loaded while it serves."""

from concurrent.futures import Future
from typing import Any, NamedTuple

from modxfer_fast.serving.client import Request, Server, ServerError
from modxfer_fast.serving.opening import check_served

_START = "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
# what a generation_config beside the weights would else have the server do
_PLAIN = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,  # stop_token_ids alone say where a text ends
}


class Written(NamedTuple):
    """What a server wrote behind a prompt.

    Attributes:
        tokens: the one that ended it among them.
        log_probs: of each, before temperature and cuts.
    """

    tokens: list[int]
    log_probs: list[float]


class ServedLoRA:
    """Adapters of a served base.

    Args:
        model: the name that the base is served under.
    """

    def __init__(self, server: Server, model: str):
        self.server, self.model = server, model

    def check(self, tokens: int) -> None:
        """Looks at whether the base is there, with room for a text, and takes adapters.

        Raises:
            ServerError: it is not, or does not.
        """
        check_served(self.server, self.model, tokens, "a prompt with its completion")
        self.unload("")  # a server that takes adapters says that it has no such one

    def load(self, name: str, path: str) -> None:
        """Has the server read an adapter in the layout of PEFT.

        Args:
            path: of a folder that the server sees too.

        Raises:
            ServerError: it finds nothing there, or cannot take what it finds.
        """
        body = {"lora_name": name, "lora_path": path, "load_inplace": True}  # also a second time
        try:
            self.server.ask(Request("/v1/load_lora_adapter", body, f"the adapter in {path}", str))
        except ServerError as error:
            if "No adapter found" in str(error):
                hint = "the server must see adapter_dir under the same path"
            elif "LoRA is not enabled" in str(error):
                hint = _START
            else:
                raise
            raise _told(error, hint) from error

    def unload(self, name: str) -> None:
        """Has the server forget an adapter, if it has it."""
        body = {"lora_name": name}
        try:
            self.server.ask(Request("/v1/unload_lora_adapter", body, "an adapter to go", str))
        except ServerError as error:
            known = "cannot be found" in str(error) or "needs to be provided" in str(error)
            if not known:
                raise (_told(error, _START) if error.status == 404 else error) from error

    def loaded(self) -> dict[str, str]:
        """The paths of the adapters that it has, by their names."""
        request = Request("/v1/models", None, "the adapters that it has")
        return self.server.decoded(
            request,
            self.server.ask(request),
            lambda reply: {each["id"]: each["root"] for each in reply["data"] if each["parent"]},
        )

    def write(
        self, name: str, prompt: list[int], max_tokens: int, *, seed: int, **sampling: Any
    ) -> "Future[Written]":
        """Asks for a completion by an adapter.

        Args:
            max_tokens: of it at most, at least 1.
            sampling: temperature, top_p, top_k, stop_token_ids and logit_bias of vLLM.
        """
        body = {
            "model": name,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "seed": seed,
            "return_token_ids": True,
            "logprobs": 0,
            **_PLAIN,
            **sampling,
        }
        request = Request("/v1/completions", body, f"a completion of {len(prompt):,} tokens")

        def read(reply: Any) -> Written:
            (choice,) = reply["choices"]
            if choice["prompt_token_ids"] != prompt:
                raise ValueError("expected the completion of the prompt, got that of another")
            written = Written(choice["token_ids"], choice["logprobs"]["token_logprobs"])
            if not 1 <= len(written.tokens) <= max_tokens:
                raise ValueError(f"expected 1 to {max_tokens} tokens, got {len(written.tokens)}")
            if len(written.log_probs) != len(written.tokens):
                raise ValueError(
                    f"expected {len(written.tokens)} logprobs, got {len(written.log_probs)}"
                )
            return written

        return self.server.submit(request, lambda reply: self.server.decoded(request, reply, read))


def _told(error: ServerError, hint: str) -> ServerError:
    told = ServerError(f"{error}; {hint}")
    told.status = error.status
    return told
