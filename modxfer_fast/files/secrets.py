"""What opens an account, and is therefore written to no file: folders are shown around."""

from typing import Any

SECRETS = ("hub_token",)  # fields of TrainingArguments


def without_secrets(value: Any) -> Any:
    """JSON-like options without their secrets."""
    if isinstance(value, dict):
        return {k: without_secrets(v) for k, v in value.items() if k not in SECRETS}
    return value
