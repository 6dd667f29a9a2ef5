"""Conversations -> ids, and which of them the assistant wrote.

A template with `{% generation %}` says it itself. For any other the assistant's turns are found in
the text: a turn is where the text changes when the message is replaced by a mark. Around what
changed belong the header that the template opens an assistant's turn with, which is context, and
what closes it, which is learnt. So a template may rewrite the conversation as turns are added, as
Qwen3's does with thoughts, and a token may span the border of a turn.
"""

import re
from bisect import bisect_left

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from modxfer_fast.data.records import Conversation, RecordError
from modxfer_fast.errors import DataError

_MARK = "\ue000"  # of the private use area: in no text, and no template strips it
_BARE = {"role": "assistant", "content": _MARK}
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatEncoder:
    """Encodes conversations with the chat template of a fast tokenizer.

    Raises:
        DataError: no template, or a slow tokenizer, which does not know where its tokens stand.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if tokenizer.chat_template is None:
            raise DataError("messages: expected a tokenizer with a chat template, got one without")
        if not tokenizer.is_fast:
            raise DataError(
                "messages: expected a fast tokenizer (tokenizer.json), which says where its tokens "
                f"stand in the text, got {type(tokenizer).__name__}"
            )
        self._tokenizer = tokenizer
        self._header, self._closing = self._frame()

    def encode(self, conversation: Conversation) -> tuple[list[int], list[bool]]:
        """Ids, and whether each is to be learnt, as it holds text of the assistant.

        Raises:
            RecordError: the template refuses the conversation, or leaves out a tool call.
        """
        messages, tools = conversation.messages, conversation.tools
        whole = self._render(messages, tools)
        if not _GENERATION.search(self._tokenizer.get_chat_template(tools=tools)):
            encoded = self._tokenizer(
                whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            spans = self._turns(whole, conversation)
            return encoded["input_ids"], _overlapping(encoded["offset_mapping"], spans)
        marked = self._tokenizer.apply_chat_template(
            messages,
            tools=tools,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        ids, offsets = marked["input_ids"], marked["offset_mapping"]
        mask = [bool(value) for value in marked["assistant_masks"]]
        if conversation.first_target or any("tool_calls" in message for message in messages):
            spans = self._turns(whole, conversation)
            if conversation.first_target:  # the template marks the turns of a prompt too
                start = spans[0][0] if spans else len(whole)
                behind = [stop > start for _, stop in offsets]
                mask = [a and b for a, b in zip(mask, behind, strict=True)]
        return ids, mask

    def _render(self, messages, tools=None, *, prompt: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=prompt
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RecordError(f"the chat template refuses it ({error})") from error

    def _frame(self) -> tuple[str, str]:
        """What stands before and behind the text of an assistant's turn, where it can be told."""
        question = {"role": "user", "content": "?"}
        try:
            asked = self._render([question])
            prompted = self._render([question], prompt=True)
            answered = self._render([question, _BARE])
        except RecordError:  # a template for other roles; turns are then bare
            return "", ""
        header = prompted[len(asked) :] if prompted.startswith(asked) else ""
        _, _, closing = answered.rpartition(_MARK)
        return header, closing

    def _turns(self, whole: str, conversation: Conversation) -> list[tuple[int, int]]:
        """Begin and end of each assistant's turn to learn, in order; RecordError where the template
        leaves out a tool call, or hides where it stands."""
        spans = []
        last = 0
        for i, message in enumerate(conversation.messages):
            if message["role"] != "assistant" or i < conversation.first_target:
                continue
            try:
                turn = self._turn(whole, conversation.messages, i, conversation.tools, last)
            except RecordError:
                if "tool_calls" not in message:
                    raise
                turn = self._call_turn(whole, conversation.messages, i, conversation.tools, last)
            if turn is None:
                continue
            begin, end = turn
            for call in message.get("tool_calls", ()):
                if call["function"]["name"] not in whole[begin:end]:
                    raise RecordError("the chat template leaves out tool calls")
            spans.append((begin, end))
            last = end
        return spans

    def _turn(self, whole: str, messages, i: int, tools, last: int) -> tuple[int, int] | None:
        """Begin and end of message i behind `last`; None where the template shows no such turn."""
        other = self._render([*messages[:i], _BARE, *messages[i + 1 :]], tools)
        if _MARK not in other:
            return None
        begin, end = _changed(whole, other, last)
        behind = self._behind_header(whole, last, begin)
        return behind or begin, end + _common_prefix(whole[end:], self._closing)

    def _call_turn(self, whole: str, messages, i: int, tools, last: int) -> tuple[int, int]:
        """As `_turn`, where the template refuses a bare mark, since answers of tools follow it.

        Other content and arguments show where the inside of the turn stands; what belongs around it
        is seen where the turn ends the conversation, and there may be a bare mark. Names stay,
        because answers may repeat them.
        """
        message = messages[i]
        calls = [
            {**call, "function": {**call["function"], "arguments": {_MARK: _MARK}}}
            for call in message["tool_calls"]
        ]
        marked = {**message, "content": message["content"] and _MARK, "tool_calls": calls}
        other = self._render([*messages[:i], marked, *messages[i + 1 :]], tools)
        cut = self._render(messages[: i + 1], tools)
        turn = self._turn(cut, messages[: i + 1], i, tools, 0)
        if _MARK not in other or turn is None:
            raise RecordError("the chat template leaves out tool calls")
        begin, end = _changed(whole, other, last)
        inner_begin, inner_end = _changed(
            cut, self._render([*messages[:i], marked], tools), turn[0]
        )
        before, after = cut[turn[0] : inner_begin], cut[inner_end : turn[1]]
        behind = self._behind_header(whole, last, begin)
        if behind is None and whole[last:begin].endswith(before):
            behind = begin - len(before)
        if behind is None or not whole.startswith(after, end):
            raise RecordError("the chat template shows a tool call otherwise once it is answered")
        return behind, end + len(after)

    def _behind_header(self, text: str, start: int, stop: int) -> int | None:
        """Where what follows the last header of an assistant's turn begins, if there is one."""
        header = text.rfind(self._header, start, stop) if self._header else -1
        return None if header < 0 else header + len(self._header)


def _changed(text: str, other: str, start: int) -> tuple[int, int]:
    """Begin and end, from `start` on, of what differs in `text` from `other`."""
    begin = max(_common_prefix(text, other), start)
    return begin, max(len(text) - _common_prefix(text[::-1], other[::-1]), begin)


def _common_prefix(a: str, b: str) -> int:
    """Characters that two texts begin with alike."""
    if a.startswith(b) or b.startswith(a):
        return min(len(a), len(b))
    # the shortest beginnings that differ; all longer ones differ too
    return bisect_left(range(min(len(a), len(b)) + 1), True, key=lambda n: a[:n] != b[:n]) - 1


def _overlapping(offsets: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[bool]:
    """For each token whether it shares a character with a span; both in order."""
    mask, k = [], 0
    for start, stop in offsets:
        while k < len(spans) and spans[k][1] <= start:
            k += 1
        mask.append(k < len(spans) and stop > spans[k][0])
    return mask
