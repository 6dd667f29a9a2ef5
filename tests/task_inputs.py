"""Tasks, tokenizers and encoders small enough for tests; nothing is fetched."""

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

COMMON = ["the", "a", "was", "seen", "near", "old", "house", "by", "one", "of", "many", "people"]
CITIES = ["paris", "rome", "oslo", "lima"]
FIRST, LAST = ["anna", "omar", "lucy", "ivan"], ["stone", "rivers", "field"]
LABELS = ("no", "yes", "maybe")
NER_LABELS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")


def sentences(count: int, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """Words and tags of sentences in which the word alone tells the tag."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        words, tags = [], []
        for _ in range(draw.randint(2, 6)):
            kind = draw.random()
            if kind < 0.2:
                words, tags = [*words, draw.choice(CITIES)], [*tags, "B-LOC"]
            elif kind < 0.4:
                words = [*words, draw.choice(FIRST), draw.choice(LAST)]
                tags = [*tags, "B-PER", "I-PER"]
            else:
                words, tags = [*words, draw.choice(COMMON)], [*tags, "O"]
        found.append((words, tags))
    return found


def write_conllu(path: Path, examples: list[tuple[list[str], list[str]]]) -> Path:
    """Index, word and tag in columns, as WikiNEuRal has them."""
    lines = []
    for words, tags in examples:
        rows = enumerate(zip(words, tags, strict=True))
        lines += [f"{i}\t{word}\t{tag}" for i, (word, tag) in rows] + [""]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_pairs(path: Path, count: int = 40, seed: int = 0) -> Path:
    """A table like SICK's: the label tells whether the second text is the first again."""
    draw = random.Random(seed)
    rows = ["pair_ID\tsentence_A\tsentence_B\tentailment_judgment"]
    for i in range(count):
        one = " ".join(draw.choices(COMMON, k=draw.randint(2, 5)))
        same = i % 2 == 0
        two = one if same else " ".join(draw.choices(CITIES, k=draw.randint(2, 5)))
        rows.append(f"{i}\t{one}\t{two}\t{'ENTAILMENT' if same else 'NEUTRAL'}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


SICK_COLUMNS = {"text_a": "sentence_A", "text_b": "sentence_B", "label": "entailment_judgment"}


def word_tokenizer(folder: Path) -> BertTokenizer:
    """WordPiece over the words above; last names are two pieces each."""
    pieces = ["sto", "##ne", "riv", "##ers", "fie", "##ld"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *COMMON, *CITIES, *FIRST, *pieces]
    vocab = folder / "vocab.txt"
    vocab.write_text("\n".join(dict.fromkeys(tokens)) + "\n")
    return BertTokenizer(str(vocab), model_max_length=64)


def byte_tokenizer(prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, with a space written into the word that follows, as RoBERTa has it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    model = Tokenizer(models.BPE(vocab, []))
    model.normalizer = normalizers.NFC()
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    model.decoder = decoders.ByteLevel()
    model.post_processor = processors.RobertaProcessing(
        ("</s>", 1), ("<s>", 0), add_prefix_space=prefix_space
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def tiny_bert(tokenizer, *, seed: int = 0, num_layers: int = 2, hidden_size: int = 64) -> BertModel:
    """An encoder of some 60,000 parameters, without a pooler."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BertModel(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=4,
                max_position_embeddings=64,
                pad_token_id=tokenizer.pad_token_id,
                initializer_range=0.1,
            ),
            add_pooling_layer=False,
        )


def tiny_llama() -> LlamaForCausalLM:
    """A language model of one block."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=30,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        )


def save_berts(folder: Path, **sizes: dict[str, int]) -> None:
    """A folder for each name with a `tiny_bert` of these sizes and the words' tokenizer."""
    (folder / "vocabulary").mkdir()
    tokenizer = word_tokenizer(folder / "vocabulary")
    for name, size in sizes.items():
        tiny_bert(tokenizer, **size).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
