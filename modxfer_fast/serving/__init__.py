"""Models behind an endpoint: what they answer, and what they generate, asked for by HTTP."""

from modxfer_fast.serving.answers import FORMATS, Listed
from modxfer_fast.serving.asking import ListedAnswers, Pending
from modxfer_fast.serving.client import Server, ServerError
from modxfer_fast.serving.lora import ServedLoRA, Written
from modxfer_fast.serving.opening import check_served, open_server

__all__ = [
    "FORMATS",
    "Listed",
    "ListedAnswers",
    "Pending",
    "ServedLoRA",
    "Server",
    "ServerError",
    "Written",
    "check_served",
    "open_server",
]
