"""Small models and batches of random ids for tests; nothing is fetched."""

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB_SIZE = 97


def tiny_llama(
    hidden_size: int = 32,
    num_layers: int = 2,
    seed: int = 0,
    tied: bool = False,
    vocab_size: int = VOCAB_SIZE,
    **config,
) -> LlamaForCausalLM:
    """A Llama of a few thousand parameters, with weights large enough for peaked softmaxes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=hidden_size,
                intermediate_size=2 * hidden_size,
                num_hidden_layers=num_layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=128,
                tie_word_embeddings=tied,
                initializer_range=0.1,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                **config,
            )
        )


class TokenDataset(Dataset):
    """Documents of random ids, of different lengths: a mean over batches is not one over tokens."""

    def __init__(
        self, size: int, max_length: int = 16, seed: int = 0, vocab_size: int = VOCAB_SIZE
    ):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, max_length + 1, (size,), generator=generator).tolist()
        self.rows = [torch.randint(3, vocab_size, (n,), generator=generator) for n in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.rows[index]}


def align_collate(features: list[dict]) -> dict:
    """One document a row, padded right; labels aligned with positions, as the trainer expects."""
    rows = [torch.as_tensor(feature["input_ids"]) for feature in features]
    width = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.full_like(input_ids, -100)
    attention_mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row
        labels[i, : len(row) - 1] = row[1:]
        attention_mask[i, : len(row)] = 1
    return {
        "input_ids": input_ids,
        "labels": labels,
        "attention_mask": attention_mask,
        "num_valid": sum(len(row) - 1 for row in rows),
    }


align_collate.labels_are_aligned = True


def pack_collate(features: list[dict]) -> dict:
    """All documents in one row; position_ids restart at each, and no label crosses a boundary."""
    rows = [torch.as_tensor(feature["input_ids"]) for feature in features]
    labels = [torch.cat([row[1:], row.new_tensor([-100])]) for row in rows]
    return {
        "input_ids": torch.cat(rows)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(len(row)) for row in rows])[None],
        "num_valid": sum(len(row) - 1 for row in rows),
    }


pack_collate.labels_are_aligned = True
