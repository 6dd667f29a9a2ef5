"""One record of any common layout -> a text, a completion or a conversation.

text                                    learn every token
prompt, completion                      texts, or lists of messages as TRL has them
messages [, tools]                      messages {role, content}, or ShareGPT's {from, value}

Beside a prompt there may be another one, of the same layout, for the teacher.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from modxfer_fast.data.facts import TEACHER_PROMPT

# ShareGPT's speakers -> roles of chat templates.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
_CALL = "function_call"


class RecordError(ValueError):
    """A record that cannot be learnt from: which column, what was expected, what came."""


@dataclass(frozen=True)
class Text:
    """Every token is learnt."""

    text: str

    def texts(self) -> Iterator[str]:
        yield self.text


@dataclass(frozen=True)
class Completion:
    """The completion is learnt.

    for_teacher: what the teacher reads, with a prompt of its own; None where it is the same.
    """

    prompt: str
    completion: str
    for_teacher: "Completion | None" = None

    def texts(self) -> Iterator[str]:
        yield self.prompt
        yield self.completion
        if self.for_teacher is not None:
            yield self.for_teacher.prompt


@dataclass(frozen=True)
class Conversation:
    """The assistant's turns are learnt, from message `first_target` on.

    messages: {"role", "content", ...}, content always a text; tool_calls with arguments as objects.
    tools: JSON schemas, or None. for_teacher: as of `Completion`.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    first_target: int = 0
    for_teacher: "Conversation | None" = None

    def texts(self) -> Iterator[str]:
        for message in self.messages:
            yield message["content"]
            if "tool_calls" in message:
                yield json.dumps(message["tool_calls"], ensure_ascii=False)
        if self.for_teacher is not None:
            for message in self.for_teacher.messages[: self.for_teacher.first_target]:
                yield message["content"]


def normalise(record: dict[str, Any], fmt: str) -> Text | Completion | Conversation:
    """What a record of one of `sources.COLUMNS` holds; a RecordError names the column at fault."""
    if fmt == "text":
        return Text(_text(record["text"], "column text"))
    tools = _tools(record.get("tools"))
    if fmt == "messages":
        messages = _messages(record["messages"], "column messages")
        return _conversation(messages, tools, 0, "column messages")
    prompt, completion = record["prompt"], record["completion"]
    document = _answered(prompt, completion, tools, "column prompt")
    if TEACHER_PROMPT not in record:
        return document
    other, where = record[TEACHER_PROMPT], "column of data.teacher_prompt"
    if isinstance(other, list) != isinstance(prompt, list):
        kinds = ["messages" if isinstance(p, list) else "text" for p in (prompt, other)]
        raise RecordError(f"{where}: expected {kinds[0]}, as the prompt is, got {kinds[1]}")
    return replace(document, for_teacher=_answered(other, completion, tools, where))


def _answered(prompt: Any, completion: Any, tools: list[dict[str, Any]] | None, where: str) -> Any:
    """A Completion, or a Conversation where the prompt is messages."""
    if not isinstance(prompt, list):
        if not isinstance(prompt, str):  # an empty prompt is one
            raise RecordError(f"{where}: expected text or messages, got {_kind(prompt)}")
        return Completion(prompt, _text(completion, "column completion"))
    context = _messages(prompt, where)
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    answer = _messages(completion, "column completion")
    return _conversation(context + answer, tools, len(context), "column completion")


def _conversation(messages, tools, first_target: int, where: str) -> Conversation:
    if not any(message["role"] == "assistant" for message in messages[first_target:]):
        raise RecordError(f"{where}: expected a turn of the assistant, got none")
    return Conversation(messages, tools, first_target)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        got = "an empty one" if value == "" else _kind(value)
        raise RecordError(f"{where}: expected text, got {got}")
    return value


def _messages(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        got = "an empty list" if value == [] else _kind(value)
        raise RecordError(f"{where}: expected a list of messages, got {got}")
    return [_message(raw, f"{where}, message {i}") for i, raw in enumerate(value, start=1)]


def _message(raw: Any, where: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise RecordError(f"{where}: expected an object with role and content, got {_kind(raw)}")
    message = _without_nulls(raw)  # Arrow gives every message every key that one of them has
    if "role" not in message and "from" in message:
        message = _from_sharegpt(message, where)
    role = message.get("role")
    if not isinstance(role, str):
        raise RecordError(f"{where}: expected role and content, got {', '.join(raw) or 'neither'}")
    if message.get("tool_calls"):
        message["tool_calls"] = [_call(call, where) for call in message["tool_calls"]]
        message.setdefault("content", "")
    else:
        message.pop("tool_calls", None)
    if "content" not in message:
        raise RecordError(f"{where}: expected content, got null or none")
    message["content"] = _content(message["content"], where)
    return message


def _from_sharegpt(message: dict[str, Any], where: str) -> dict[str, Any]:
    speaker, value = message["from"], message.get("value")
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    if speaker == _CALL:
        return {**rest, "role": "assistant", "tool_calls": [_parsed(value)]}
    if speaker not in _SPEAKERS:
        known = ", ".join((*_SPEAKERS, _CALL))
        raise RecordError(f"{where}: expected from to be one of {known}, got {speaker!r}")
    content = {} if value is None else {"content": value}
    return {**rest, "role": _SPEAKERS[speaker], **content}


def _content(value: Any, where: str) -> str:
    """A text, or the texts of parts {"type": "text", "text"} joined."""
    if isinstance(value, list):
        for part in value:
            if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else _kind(part)
                raise RecordError(f"{where}: expected parts of text alone, got {kind}")
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise RecordError(f"{where}: expected content to be text, got {_kind(value)}")
    return value


def _call(call: Any, where: str) -> dict[str, Any]:
    """{"type": "function", "function": {"name", "arguments"}}, as templates read it."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RecordError(
            f"{where}: expected tool_calls with a function's name and arguments, got {call!r}"
        )
    function = {**function, "arguments": _parsed(function.get("arguments", {}))}
    outer = {key: value for key, value in call.items() if call is not function and key == "id"}
    return {"type": "function", **outer, "function": function}


def _tools(value: Any) -> list[dict[str, Any]] | None:
    value = _parsed(value)
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RecordError(f"column tools: expected a list of JSON schemas, got {_kind(value)}")
    return [_without_nulls(tool) for tool in value]


def _parsed(value: Any) -> Any:
    """JSON in a text as what it says; any other text as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
