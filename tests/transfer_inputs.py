"""Small tokenizers and models of several families for the tests of module transfer."""

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoModelForTokenClassification,
    BertConfig,
    DistilBertConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "An elephant walks slowly home, past the river and the mill.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "Le cœur déçu mais l'âme plutôt naïve, Louÿs rêva de crapaüter.",
    "naïve café owners overestimate the unbelievable weather",
]


def wordpiece(vocab_size=120, texts=TEXTS):
    """As BERT's: pieces ##, [CLS] text [SEP], characters outside the texts are unknown."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=vocab_size, special_tokens=special, show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


def byte_level(vocab_size=330, texts=TEXTS):
    """As RoBERTa's: bytes, a space belongs to the word behind it, <s> text </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=["<s>", "<pad>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def sentencepiece_like(vocab_size=120, texts=TEXTS):
    """As XLM-R's: a unigram model, the start of a word marked."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        texts,
        trainers.UnigramTrainer(
            vocab_size=vocab_size,
            special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
            unk_token="<unk>",
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )


FAMILIES = ("bert", "roberta", "distilbert", "llama")


def tiny_model(
    family="bert",
    *,
    num_layers=2,
    hidden_size=16,
    intermediate_size=24,
    vocab_size=400,
    seed=0,
    **options,
):
    """A random model with a task head, 64 positions; the same seed gives the same weights.

    Norms and biases are random too, so that no place looks like another.
    """
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": vocab_size,
        "max_position_embeddings": 64,
        "pad_token_id": 1 if family == "roberta" else 0,
    }
    if family == "distilbert":
        config = DistilBertConfig(
            n_layers=num_layers,
            dim=hidden_size,
            hidden_dim=intermediate_size,
            n_heads=4,
            **sizes,
            **options,
        )
    else:
        of_family = {"bert": BertConfig, "roberta": RobertaConfig, "llama": LlamaConfig}[family]
        if family == "llama":
            options = {"num_key_value_heads": 2, **options}
        config = of_family(
            num_hidden_layers=num_layers,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_attention_heads=4,
            **sizes,
            **options,
        )
    if family == "llama":
        model = LlamaForCausalLM(config)
    else:
        model = AutoModelForTokenClassification.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.2)
        else:
            torch.nn.init.normal_(parameter, 0.0, 0.3)
    return model
