"""Documents -> pieces: what is a target in each format."""

import copy
import itertools

import pytest
from tokenizers.processors import TemplateProcessing

from modxfer_fast.data import DataError, train_tokenizer
from modxfer_fast.data.encoding import ROW, tokenise_documents

CORPUS = ["the quick brown fox jumps over the lazy dog. " * 4, "print('hello, world')\n" * 4]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS, 320)


def pieces(fmt, rows, tokenizer, max_length=64):
    out = tokenise_documents(fmt, tokenizer, max_length)(rows)
    assert not any(out["problem"])
    return list(zip(out["input_ids"], out["is_target"], strict=True))


def problems(fmt, rows, tokenizer, max_length=64):
    out = tokenise_documents(fmt, tokenizer, max_length)(rows)
    return [
        problem for ids, problem in zip(out["input_ids"], out["problem"], strict=True) if not ids
    ]


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
    rows = {"text": ["", None, 5, "the fox"]}
    assert problems("text", rows, tokenizer) == [
        "column text: expected text, got an empty one",
        "column text: expected text, got null",
        "column text: expected text, got int",
    ]
    out = tokenise_documents("text", tokenizer, 64)({**rows, ROW: [4, 5, 6, 7]})
    assert out["row"] == [4, 5, 6, 7]
    assert tokenizer.decode(out["input_ids"][3]) == "the fox<|endoftext|>"


def test_completion_alone_is_learnt(tokenizer):
    rows = {"prompt": ["the fox"], "completion": [" jumps over"]}
    [(ids, mask)] = pieces("prompt_completion", rows, tokenizer)
    assert targets(ids, mask, tokenizer) == " jumps over<|endoftext|>"
    assert not any(mask[: len(tokenizer("the fox")["input_ids"])])


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("ending", ["", "<|endoftext|>"])
def test_an_end_of_text_that_a_prompt_has_stays(tokenizer, adds, ending):
    prompt = "the fox" + ending
    written = tokenizer(prompt)["input_ids"]
    if adds:
        tokenizer, end = copy.deepcopy(tokenizer), tokenizer.eos_token
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
        )
        assert tokenizer(prompt)["input_ids"] == [*written, tokenizer.eos_token_id]
    rows = {"prompt": [prompt], "completion": [" jumps"]}
    [(ids, mask)] = pieces("prompt_completion", rows, tokenizer)
    assert ids[: mask.index(True)] == written


def test_completion_beyond_max_length_is_cut(tokenizer):
    rows = {"prompt": ["the fox"], "completion": [CORPUS[0]]}
    out = tokenise_documents("prompt_completion", tokenizer, 10)(rows)
    assert (
        [len(ids) for ids in out["input_ids"]] == [len(mask) for mask in out["is_target"]] == [10]
    )
    assert out["is_cut"] == [True]
    assert tokenise_documents("prompt_completion", tokenizer, 400)(rows)["is_cut"] == [False]


def test_a_prompt_that_leaves_no_room_is_told(tokenizer):
    rows = {"prompt": [CORPUS[0]], "completion": ["x"]}
    [problem] = problems("prompt_completion", rows, tokenizer, 8)
    assert problem == "nothing to learn within max_length=8 tokens"


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"prompt": 3, "completion": "b"}, "column prompt: expected text or messages, got int"),
        ({"prompt": "a", "completion": None}, "column completion: expected text, got null"),
        ({"prompt": "a", "completion": ["b"]}, "column completion: expected text, got list"),
        ({"messages": None}, "column messages: expected a list of messages, got null"),
        ({"messages": []}, "column messages: expected a list of messages, got an empty list"),
        ({"messages": ["hi"]}, "message 1: expected an object with role and content, got str"),
        ({"messages": [{"speaker": "a"}]}, "message 1: expected role and content, got speaker"),
        ({"messages": [{"role": "user"}]}, "message 1: expected content, got null or none"),
        ({"messages": [{"from": "cat", "value": ""}]}, "expected from to be one of human"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "message 1: expected parts of text alone, got image",
        ),
        (
            {"messages": [{"role": "user", "content": "hi"}]},
            "column messages: expected a turn of the assistant, got none",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]},
            "expected tool_calls with a function's name",
        ),
        ({"messages": [{"role": "user", "content": "hi"}], "tools": "none"}, "column tools: exp"),
    ],
)
def test_what_cannot_be_read_is_named(tokenizer, record, problem):
    fmt = "messages" if "messages" in record else "prompt_completion"
    [told] = problems(fmt, {name: [value] for name, value in record.items()}, tokenizer)
    assert problem in told


def test_assistant_turns_alone_are_learnt(tokenizer):
    messages = [
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": "jumps"},
        {"role": "user", "content": "over"},
        {"role": "assistant", "content": "the dog"},
    ]
    [(ids, mask)] = pieces("messages", {"messages": [messages]}, tokenizer, max_length=400)
    assert targets(ids, mask, tokenizer) == "jumps<|im_end|>\nthe dog<|im_end|>\n"


def test_messages_without_a_template():
    tokenizer = train_tokenizer(CORPUS, 320)
    tokenizer.chat_template = None
    messages = [{"role": "assistant", "content": "jumps"}]
    with pytest.raises(DataError, match="expected a tokenizer with a chat template"):
        pieces("messages", {"messages": [messages]}, tokenizer)
