"""What a model writes, found without any of the code that writes; words for tokens."""

from pathlib import Path

import torch


@torch.no_grad()
def greedy(model, prompt: list[int], room: int, stop=(), num_classes=None) -> list[int]:
    """The likeliest tokens of one row, without padding and without a cache."""
    ids = list(prompt)
    for _ in range(room):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :num_classes]
        ids.append(int(logits.argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


class Numerals:
    """A tokenizer whose words are the ids."""

    eos_token_id, pad_token_id = 2, 0

    def __len__(self) -> int:
        return 97

    def decode(self, ids, skip_special_tokens=True) -> str:
        return " ".join(map(str, ids))

    def save_pretrained(self, folder) -> None:
        Path(folder, "numerals").touch()
