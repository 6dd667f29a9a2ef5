"""Documents -> pieces: what is a target in each format."""

import itertools

import pytest

from modxfer_fast.data import DataError, train_tokenizer
from modxfer_fast.data.encoding import encoder

CORPUS = ["the quick brown fox jumps over the lazy dog. " * 4, "print('hello, world')\n" * 4]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS, 320)


def pieces(fmt, rows, tokenizer, max_length=64):
    out = encoder(fmt, tokenizer, max_length)(rows)
    return list(zip(out["input_ids"], out["is_target"], strict=True))


def targets(ids, mask, tokenizer):
    return tokenizer.decode([i for i, is_target in zip(ids, mask, strict=True) if is_target])


def test_text_ends_and_is_learnt_whole(tokenizer):
    [(ids, mask)] = pieces("text", {"text": ["the fox"]}, tokenizer)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]) == "the fox"
    assert all(mask)


def test_long_text_is_cut_so_that_each_token_is_predicted_once(tokenizer):
    text = CORPUS[0]
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    cut = [ids for ids, _ in pieces("text", {"text": [text]}, tokenizer, max_length=7)]
    assert all(2 <= len(ids) <= 7 for ids in cut)
    assert [token for ids in cut for token in ids[1:]] == whole[1:]
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(cut))


def test_empty_and_missing_texts_are_left_out(tokenizer):
    assert pieces("text", {"text": ["", None]}, tokenizer) == []


def test_completion_alone_is_learnt(tokenizer):
    rows = {"prompt": ["the fox"], "completion": [" jumps over"]}
    [(ids, mask)] = pieces("prompt_completion", rows, tokenizer)
    assert targets(ids, mask, tokenizer) == " jumps over<|endoftext|>"
    assert not any(mask[: len(tokenizer("the fox")["input_ids"])])


def test_completion_beyond_max_length_is_cut(tokenizer):
    rows = {"prompt": ["the fox"], "completion": [CORPUS[0]]}
    [(ids, mask)] = pieces("prompt_completion", rows, tokenizer, max_length=10)
    assert len(ids) == len(mask) == 10


def test_column_of_another_type(tokenizer):
    rows = {"prompt": [["a"]], "completion": ["b"]}
    with pytest.raises(DataError, match="column prompt: expected text, got list"):
        pieces("prompt_completion", rows, tokenizer)


def test_assistant_turns_alone_are_learnt(tokenizer):
    messages = [
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": "jumps"},
        {"role": "user", "content": "over"},
        {"role": "assistant", "content": "the dog"},
    ]
    [(ids, mask)] = pieces("messages", {"messages": [messages]}, tokenizer, max_length=400)
    assert targets(ids, mask, tokenizer) == "jumps<|im_end|>\nthe dog<|im_end|>\n"


def test_template_that_rewrites_earlier_turns(tokenizer):
    tokenizer = train_tokenizer(CORPUS, 320)
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    messages = [
        {"role": "user", "content": "over"},
        {"role": "assistant", "content": "jumps"},
        {"role": "user", "content": "again"},
    ]
    with pytest.raises(DataError, match="rewrites the conversation at turn 1"):
        pieces("messages", {"messages": [messages]}, tokenizer)


def test_messages_without_a_template():
    tokenizer = train_tokenizer(CORPUS, 320)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="expected a tokenizer with a chat template"):
        pieces("messages", {"messages": [[]]}, tokenizer)
