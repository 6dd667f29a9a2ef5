"""How a server of models is reached: keys that every section about one has."""

from typing import Annotated

from pydantic import Field, model_validator

from modxfer_fast.config.section import NotNegative, Positive, PositiveInt, Section

WAYS = """max_in_flight: requests at a time, of each process of the job.
    timeout_s: of one try of a request.
    retries: of a request, after the first try, where a fault may pass; tries that find no server,
        as while it starts again, are not counted, unless this is 0.
    retry_s: seconds in which a request may be tried again.
    api_key_env: name of the environment variable that holds the key; null sends none."""


class ServerSection(Section):
    """A model behind an endpoint."""

    url: str
    model: str
    max_in_flight: PositiveInt = 8
    timeout_s: Positive = 120.0
    retries: Annotated[int, Field(ge=0)] = 5
    retry_s: NotNegative = 300.0
    api_key_env: str | None = None

    @model_validator(mode="after")
    def _is_an_address(self):
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url: expected http://HOST:PORT or https://HOST, got {self.url}")
        return self


# that say where a server is and how it is reached, not what it answers
REACHING = tuple(name for name in ServerSection.model_fields if name != "model")
