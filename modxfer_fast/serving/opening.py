"""A server as a section of a job names it, and what it must serve."""

import os

from modxfer_fast.config import ConfigError, ServerSection
from modxfer_fast.serving.client import Request, Server


def open_server(section: ServerSection, where: str) -> Server:
    """The server, not asked yet.

    Args:
        where: dotted path of the section, for messages.

    Raises:
        ConfigError: no key in the variable that is to hold it.
    """
    key = None
    if section.api_key_env is not None:
        key = os.environ.get(section.api_key_env)
        if not key:
            raise ConfigError(
                f"{where}.api_key_env: expected the key in {section.api_key_env}, got nothing there"
            )
    return Server(
        section.url,
        timeout_s=section.timeout_s,
        retries=section.retries,
        retry_s=section.retry_s,
        max_in_flight=section.max_in_flight,
        api_key=key,
    )


def check_served(server: Server, model: str, tokens: int, what: str) -> None:
    """Looks at whether a server serves a model, with room for some tokens.

    Args:
        what: that they are, for messages.

    Raises:
        ServerError: it does not, or cannot be reached.
    """
    request = Request("/v1/models", None, "the models that it serves")
    reply = server.ask(request)
    served = server.decoded(
        request,
        reply,
        lambda reply: {each["id"]: each.get("max_model_len") for each in reply["data"]},
    )
    if model not in served:
        raise server.fault(request, f"expected {model} among them, got {', '.join(served)}")
    longest = served[model]
    if longest is not None and longest < tokens:
        raise server.fault(
            request,
            f"expected room for {tokens:,} tokens, those of {what}, got a max_model_len of "
            f"{longest:,} of {model}",
        )
