"""Sending a finished student to the hub: once, when the whole job is done."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from modxfer_fast.config import ConfigError
from modxfer_fast.errors import UserError


def check_hub(token: str | None, where: str) -> None:
    """Raise a ConfigError unless the hub answers to a token that may write."""
    try:
        account = HfApi().whoami(token=token)
    except Exception as error:  # refused, unreachable, or no token: each library has its own class
        raise ConfigError(f"{where}: the hub cannot be used ({error})") from error
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise ConfigError(f"{where}: expected a token that may write, got one that may read alone")


def send(folder: Path, training: dict[str, Any], name: str) -> str:
    """Puts a student's folder on the hub, and returns its address.

    Args:
        training: section of the job. name: of the repository where it names none.
    """
    api = HfApi(token=training.get("hub_token"))
    wanted, revision = training.get("hub_model_id") or name, training.get("hub_revision")
    try:
        url = api.create_repo(wanted, private=training.get("hub_private_repo"), exist_ok=True)
        if revision is not None:
            api.create_branch(url.repo_id, branch=revision, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            revision=revision,
            commit_message="Student distilled by modxfer_fast",
        )
    except Exception as error:  # the job is done all the same
        raise UserError(
            f"training.push_to_hub: {wanted} could not be sent ({error}); the output is whole: "
            f"hf upload {wanted} {folder}"
        ) from error
    return str(url)
