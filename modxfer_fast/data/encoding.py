"""Documents -> pieces of at most `max_length` tokens, each token marked as target or context.

A piece is `{"input_ids": [n], "is_target": [n]}`; `is_target[i]`: token i is to be predicted.
"""

from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from modxfer_fast.data.errors import DataError

Rows = dict[str, list]


def encoder(
    fmt: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Callable[[Rows], Rows]:
    """A function for `Dataset.map(batched=True)`: documents of format `fmt` -> pieces."""
    encode = {
        "text": _encode_text,
        "prompt_completion": _encode_completion,
        "messages": _encode_messages,
    }[fmt]

    def encode_batch(rows: Rows) -> Rows:
        pieces = [piece for piece in encode(rows, tokenizer, max_length) if piece[0]]
        return {
            "input_ids": [ids for ids, _ in pieces],
            "is_target": [mask for _, mask in pieces],
        }

    return encode_batch


def encoder_rows(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[Rows], Rows]:
    """A function for `Dataset.map(batched=True)`: texts -> rows of an encoder.

    A row is `{"input_ids", "length"}` of at most `max_length` tokens, with the tokenizer's special
    tokens around each; a longer text becomes several rows, an empty one none.
    """

    def encode_batch(rows: Rows) -> Rows:
        texts = [text for text in rows["text"] if text and text.strip()]
        if not texts:
            return {"input_ids": [], "length": []}
        encoded = tokenizer(
            texts,
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return {"input_ids": encoded["input_ids"], "length": list(map(len, encoded["input_ids"]))}

    return encode_batch


def _encode_text(rows: Rows, tokenizer, max_length: int):
    texts = [text for text in rows["text"] if text]
    pieces = []
    for ids in tokenizer(texts, verbose=False)["input_ids"] if texts else []:
        ids = _ended(ids, tokenizer)
        # pieces of one document share one token, so that each token but the first is a target once
        for start in range(0, max(len(ids) - 1, 1), max_length - 1):
            piece = ids[start : start + max_length]
            pieces.append((piece, [True] * len(piece)))
    return pieces


def _encode_completion(rows: Rows, tokenizer, max_length: int):
    pieces = []
    for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True):
        for name, value in (("prompt", prompt), ("completion", completion)):
            if not isinstance(value, str):
                raise DataError(f"column {name}: expected text, got {type(value).__name__}")
        # encoded apart: the border between context and target is then a border between tokens
        head = tokenizer(prompt, verbose=False)["input_ids"]
        if head and head[-1] == tokenizer.eos_token_id and prompt:
            head = head[:-1]
        tail = tokenizer(completion, add_special_tokens=False, verbose=False)["input_ids"]
        ids = _ended(head + tail, tokenizer)
        mask = [False] * len(head) + [True] * (len(ids) - len(head))
        pieces.append((ids[:max_length], mask[:max_length]))
    return pieces


def _encode_messages(rows: Rows, tokenizer, max_length: int):
    if tokenizer.chat_template is None:
        raise DataError("messages: expected a tokenizer with a chat template, got one without")
    pieces = []
    for messages in rows["messages"]:
        ids, mask = _encode_chat(messages, tokenizer)
        pieces.append((ids[:max_length], mask[:max_length]))
    return pieces


def _encode_chat(messages: list[dict], tokenizer) -> tuple[list[int], list[bool]]:
    """Ids of a conversation; targets are what each assistant turn adds to its prompt."""

    def render(upto: int, prompt: bool) -> list[int]:
        if upto == 0:  # templates refuse an empty conversation
            return []
        return tokenizer.apply_chat_template(
            messages[:upto], add_generation_prompt=prompt, tokenize=True, return_dict=False
        )

    whole = render(len(messages), False)
    mask = [False] * len(whole)
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, stop = render(turn, True), render(turn + 1, False)
        if whole[: len(stop)] != stop or stop[: len(start)] != start:
            raise DataError(
                "messages: expected a chat template that only appends text as turns are added; "
                f"this one rewrites the conversation at turn {turn}"
            )
        mask[len(start) : len(stop)] = [True] * (len(stop) - len(start))
    return whole, mask


def _ended(ids: list[int], tokenizer) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if ids and ids[-1] == end else [*ids, end]
