"""Models behind an endpoint: what they answer, and what they generate, asked for by HTTP."""

from modxfer_fast.serving.answers import FORMATS, Listed
from modxfer_fast.serving.asking import ListedAnswers, Pending
from modxfer_fast.serving.client import Server, ServerError

__all__ = ["FORMATS", "Listed", "ListedAnswers", "Pending", "Server", "ServerError"]
