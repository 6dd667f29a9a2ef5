"""Which tokens of a conversation are learnt, under the templates of well-known models."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from modxfer_fast.data import DataError
from modxfer_fast.data.chat import ChatEncoder
from modxfer_fast.data.records import RecordError, normalise
from tests.data.chat_templates import CHATML, GEMMA, LLAMA3, MARKED_CHATML, QWEN3, STRICT_TOOLS

SPECIAL = [
    *("<|begin|>", "<|end|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
]
CORPUS = [
    "a question\n\nan answer\n\nassistant\n\n\nuser\n\nmodel\n\n" * 20,
    '<think>\nhm\n</think>\n\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>' * 20,
]
BASE = [
    {"role": "user", "content": "a question"},
    {"role": "assistant", "content": "an answer"},
    {"role": "user", "content": "another"},
    {"role": "assistant", "content": "the end"},
]


def byte_level_tokenizer(template, trim_offsets=False) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|begin|>", eos_token="<|end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


TOKENIZERS = {
    name: byte_level_tokenizer(template)
    for name, template in (
        ("chatml", CHATML),
        ("marked", MARKED_CHATML),
        ("llama3", LLAMA3),
        ("gemma", GEMMA),
        ("qwen3", QWEN3),
        ("strict", STRICT_TOOLS),
    )
}


def conversation(messages, **columns):
    return normalise({"messages": messages, **columns}, "messages")


def learnt(name, document) -> list[str]:
    """The texts of the runs of tokens that are learnt."""
    tokenizer = TOKENIZERS[name]
    ids, mask = ChatEncoder(tokenizer).encode(document)
    whole = tokenizer.apply_chat_template(
        document.messages, tools=document.tools, return_dict=False
    )
    assert ids == whole
    runs, previous = [], False
    for token, is_target in zip(ids, mask, strict=True):
        if is_target:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = is_target
    return [tokenizer.decode(run) for run in runs]


THOUGHT = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", ["an answer<|im_end|>\n", "the end<|im_end|>\n"]),
        ("marked", ["an answer<|im_end|>", "the end<|im_end|>"]),
        ("llama3", ["an answer<|eot_id|>", "the end<|eot_id|>"]),
        ("gemma", ["an answer<end_of_turn>\n", "the end<end_of_turn>\n"]),
        ("qwen3", ["an answer<|im_end|>\n", f"{THOUGHT}the end<|im_end|>\n"]),
    ],
)
def test_turns_of_the_assistant(name, expected):
    assert learnt(name, conversation(BASE)) == expected


@pytest.mark.parametrize("content", ["\nHi", "\n\nHi", "\n\n\nHi", " Hi", "\n\n", "Hi\n\n", "é🦊"])
@pytest.mark.parametrize("name", ["chatml", "marked"])
def test_whitespace_at_the_border_of_a_turn(name, content):
    messages = [BASE[0], {"role": "assistant", "content": content}, *BASE[2:]]
    first, second = learnt(name, conversation(messages))
    end = "<|im_end|>" + ("\n" if name == "chatml" else "")
    # a token across the border belongs to both sides
    assert first in (content + end, "\n" + content + end)
    assert second == "the end" + end


@pytest.mark.parametrize("name", ["llama3", "gemma", "qwen3"])
def test_content_that_a_template_strips(name):
    messages = [*BASE[:3], {"role": "assistant", "content": "\n\nthe end"}]
    assert "the end" in learnt(name, conversation(messages))[1]
    assert "another" not in learnt(name, conversation(messages))[1]


def test_thoughts_are_learnt_where_the_template_shows_them():
    thinking = "<think>\nhm\n</think>\n\n"
    messages = [
        BASE[0],
        {"role": "assistant", "content": thinking + "an answer"},
        BASE[2],
        {"role": "assistant", "content": "the end", "reasoning_content": "hm"},
    ]
    assert learnt("qwen3", conversation(messages)) == [
        "an answer<|im_end|>\n",  # of earlier turns the template shows none
        thinking + "the end<|im_end|>\n",
    ]


TOOLS = [{"type": "function", "function": {"name": "lookup", "parameters": {}}}]
CALLING = [
    {"role": "user", "content": "a question"},
    {
        "role": "assistant",
        "tool_calls": [
            {"type": "function", "function": {"name": "lookup", "arguments": '{"key": 1}'}}
        ],
    },
    {"role": "tool", "content": "one"},
    {"role": "assistant", "content": "an answer"},
]
CALL = '<tool_call>\n{"name": "lookup", "arguments": {"key": 1}}\n</tool_call><|im_end|>\n'


def test_tool_calls_are_learnt_and_their_answers_are_not():
    assert learnt("qwen3", conversation(CALLING, tools=TOOLS)) == [
        CALL,
        f"{THOUGHT}an answer<|im_end|>\n",
    ]


@pytest.mark.parametrize("template", [CHATML, MARKED_CHATML])
def test_a_template_without_tool_calls_is_told(template):
    # naming a tool in front of the conversation does not make up for the call
    tokenizer = byte_level_tokenizer("{{ tools | tojson }}" + template)
    with pytest.raises(RecordError, match="the chat template leaves out tool calls"):
        ChatEncoder(tokenizer).encode(conversation(CALLING, tools=TOOLS))


def test_tool_calls_of_a_template_that_checks_turns():
    call = CALLING[1]["tool_calls"][0]
    again = {"role": "assistant", "tool_calls": [call, call]}  # two of them, as one turn
    messages = [*CALLING[:3], again, *CALLING[2:], *BASE]
    one = '{"name": "lookup", "arguments": {"key": 1}}'
    assert learnt("strict", conversation(messages)) == [
        f"[CALLS] [{one}]<|end|>",
        f"[CALLS] [{one}, {one}]<|end|>",
        "an answer<|end|>",
        "an answer<|end|>",
        "the end<|end|>",
    ]


def test_a_call_that_is_quoted_before_it_is_made():
    call = '[CALLS] [{"name": "lookup", "arguments": {"key": 1}}]<|end|>'
    messages = [{"role": "user", "content": f"say {call}"}, *CALLING[1:]]
    tokenizer = TOKENIZERS["strict"]
    ids, mask = ChatEncoder(tokenizer).encode(conversation(messages))
    assert learnt("strict", conversation(messages)) == [call, "an answer<|end|>"]
    assert tokenizer.decode(ids[: mask.index(True)]).endswith(f"{call}[/INST]")


def test_a_call_that_is_shown_otherwise_once_it_is_answered_is_told():
    template = STRICT_TOOLS.replace("'[CALLS] ['", "('[LAST]' if loop.last else '[CALLS]') + ' ['")
    with pytest.raises(RecordError, match="shows a tool call otherwise once it is answered"):
        ChatEncoder(byte_level_tokenizer(template)).encode(conversation(CALLING))


def test_a_checking_template_without_arguments_is_told():
    template = STRICT_TOOLS.replace("call.function | tojson", "call.function.name")
    with pytest.raises(RecordError, match="the chat template leaves out tool calls"):
        ChatEncoder(byte_level_tokenizer(template)).encode(conversation(CALLING))


@pytest.mark.parametrize("content", ["", "let me see"])
def test_calls_behind_a_header(content):
    template = QWEN3.replace(
        """{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}""",
        """{%- if not messages[loop.index0 - 1].tool_calls %}
        {{ raise_exception('a tool answers no call') }}{%- endif %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}""",
    )
    tokenizer = byte_level_tokenizer(template)
    messages = [CALLING[0], {**CALLING[1], "content": content}, *CALLING[2:]]
    document = conversation(messages, tools=TOOLS)
    expected = ChatEncoder(TOKENIZERS["qwen3"]).encode(document)
    assert ChatEncoder(tokenizer).encode(document) == expected


@pytest.mark.parametrize("arguments", [{}, "not JSON"])
def test_calls_whose_arguments_are_no_mapping_or_empty(arguments):
    call = {"function": {"name": "lookup", "arguments": arguments}}
    messages = [CALLING[0], {"role": "assistant", "tool_calls": [call]}, *CALLING[2:]]
    call, answer = learnt("strict", conversation(messages))
    assert call.startswith('[CALLS] [{"name": "lookup"')
    assert call.endswith("]<|end|>")
    assert answer == "an answer<|end|>"


def test_sharegpt_is_the_same_conversation():
    theirs = [
        {"from": "human", "value": "a question"},
        {"from": "function_call", "value": '{"name": "lookup", "arguments": {"key": 1}}'},
        {"from": "observation", "value": "one"},
        {"from": "gpt", "value": "an answer"},
    ]
    assert conversation(theirs).messages == conversation(CALLING).messages
    assert conversation(theirs, tools='[{"type": "function"}]').tools == [{"type": "function"}]


@pytest.mark.parametrize("name", ["chatml", "marked", "qwen3"])
def test_turns_of_a_prompt_are_context(name):
    record = {"prompt": BASE[:3], "completion": BASE[3:]}
    [last] = learnt(name, normalise(record, "prompt_completion"))
    assert last.startswith(THOUGHT if name == "qwen3" else "the end")
    record["completion"] = "the end"
    assert learnt(name, normalise(record, "prompt_completion")) == [last]


def test_what_a_template_refuses_is_told():
    system = [{"role": "system", "content": "be brief"}, *BASE]
    with pytest.raises(RecordError, match=r"refuses it \(System role not supported\)"):
        ChatEncoder(TOKENIZERS["gemma"]).encode(conversation(system))


def test_a_template_that_shows_the_last_turn_alone():
    tokenizer = byte_level_tokenizer("{{ messages[-1]['content'] }}")
    ids, mask = ChatEncoder(tokenizer).encode(conversation(BASE))
    assert tokenizer.decode(ids) == "the end"
    assert all(mask)


def test_offsets_without_surrounding_spaces():
    tokenizer = byte_level_tokenizer(CHATML, trim_offsets=True)
    messages = [BASE[0], {"role": "assistant", "content": "\n\nan  answer"}]
    ids, mask = ChatEncoder(tokenizer).encode(conversation(messages))
    text = tokenizer.decode([i for i, is_target in zip(ids, mask, strict=True) if is_target])
    assert text.strip() == "an  answer<|im_end|>"


def test_a_text_that_quotes_the_header():
    messages = [
        {"role": "user", "content": "say <|im_start|>assistant\nno"},
        {"role": "assistant", "content": "<|im_start|>assistant\nyes"},
    ]
    assert learnt("chatml", conversation(messages)) == ["<|im_start|>assistant\nyes<|im_end|>\n"]


def test_tokenizers_that_cannot():
    tokenizer = byte_level_tokenizer(None)
    with pytest.raises(DataError, match="expected a tokenizer with a chat template"):
        ChatEncoder(tokenizer)
