"""Rows whose documents have teachers, and training on several teachers written out by hand."""

import copy

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from modxfer_fast.data.facts import TEACHER
from tests.support.models import TokenDataset, tiny_llama

NAMES = ("code", "chat", "rare")
WEIGHTS = {"code": 2.0, "chat": 0.5}  # 1 where there is none
TEMPERATURE, KD_WEIGHT, CE_WEIGHT = 1.5, 0.7, 0.4


def teacher_models() -> dict[str, PreTrainedModel]:
    """Of different widths and depths."""
    sizes = ((48, 3), (32, 2), (64, 1))
    return {
        name: tiny_llama(*size, seed=i)
        for i, (name, size) in enumerate(zip(NAMES, sizes, strict=True), start=1)
    }


def with_adapters() -> PeftModel:
    """A student whose own network can teach, with and without its adapters."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        targets = ["q_proj", "down_proj"]
        return get_peft_model(
            tiny_llama(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        )


def distance_of(state, truth, start) -> float:
    """Of weights from the true ones, in terms of how far these moved from the start."""
    moved = torch.cat([(truth[k] - start[k]).flatten() for k in truth]).norm()
    return torch.cat([(truth[k] - state[k].double()).flatten() for k in truth]).norm() / moved


class RoutedRows(torch.utils.data.Dataset):
    """`size` rows of two documents, of one teacher in every fourth row, else of two. The third
    teacher is in every fourth row alone: not in all batches, and not at once on all ranks."""

    def __init__(self, size: int):
        texts = TokenDataset(2 * size).rows
        self.documents = []
        for i in range(size):
            first = i % 2
            second = 2 if i % 4 == 3 else first if i % 4 == 0 else 1 - first
            self.documents.append([(texts[2 * i], first), (texts[2 * i + 1], second)])

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> dict:
        documents = self.documents[index]
        ids = torch.cat([ids for ids, _ in documents]).tolist()
        return {
            "input_ids": ids,
            "is_target": [True] * len(ids),
            "lengths": [len(ids) for ids, _ in documents],
            TEACHER: [number for _, number in documents],
        }


def loss_of_document(
    student: nn.Module, teachers: list[nn.Module], ids: torch.Tensor, number: int, of: str
) -> torch.Tensor:
    """The summed loss of one document, from whole logits and the formulas of the divergence."""
    log_q = (student(input_ids=ids[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
    with torch.no_grad():
        log_ps = [
            (teacher(input_ids=ids[None]).logits[0, :-1] / TEMPERATURE).log_softmax(-1)
            for teacher in teachers
        ]

    def kl(log_p: torch.Tensor) -> torch.Tensor:
        return (log_p.exp() * (log_p - log_q)).sum()

    weights = [WEIGHTS.get(name, 1.0) for name in NAMES]
    if of == "route":
        kd = kl(log_ps[number])
    elif of == "losses":
        kd = sum(w * kl(log_p) for w, log_p in zip(weights, log_ps, strict=True))
    else:
        mixed = sum(w * log_p.exp() for w, log_p in zip(weights, log_ps, strict=True))
        kd = kl((mixed / sum(weights)).log())
    log_probs = student(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    ce = -log_probs.gather(-1, ids[1:, None]).sum()
    return KD_WEIGHT * kd + CE_WEIGHT * ce


def train_by_hand(
    rows: RoutedRows,
    rows_per_step: int,
    of: str,
    learning_rate: float,
    dtype: torch.dtype,
    student: nn.Module | None = None,
    models: list[nn.Module] | None = None,
) -> dict[str, torch.Tensor]:
    """The weights of the student after plain SGD, document by document.

    Args:
        student, models: by default a tiny Llama, and `teacher_models`.
    """
    student = (student or tiny_llama()).to(dtype)
    models = models or list(teacher_models().values())
    teachers = [copy.deepcopy(model).to(dtype).eval() for model in models]
    trained = [param for param in student.parameters() if param.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=learning_rate)
    for start in range(0, len(rows), rows_per_step):
        own = [pair for row in rows.documents[start : start + rows_per_step] for pair in row]
        labels = sum(len(ids) - 1 for ids, _ in own)
        for ids, number in own:
            (loss_of_document(student, teachers, ids, number, of) / labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student.state_dict()
