"""Packed rows whose documents count unequally, and the training on them written out by hand."""

import copy

import torch
from torch import nn

from modxfer_fast.data.facts import LOSS_WEIGHT
from modxfer_fast.engine import Objective
from tests.support.models import TokenDataset, align_collate
from tests.support.reference import dense_loss, dense_terms

WEIGHTS = (1.0, 0.25, 3.0, 0.0)


class WeightedRows(torch.utils.data.Dataset):
    """`size` rows of two documents each, of different lengths and weights."""

    def __init__(self, size: int):
        documents = TokenDataset(2 * size).rows
        self.documents = [
            [(documents[2 * i + k], WEIGHTS[(2 * i + k * k + i // 4) % 4]) for k in (0, 1)]
            for i in range(size)
        ]

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> dict:
        documents = self.documents[index]
        ids = torch.cat([ids for ids, _ in documents]).tolist()
        return {
            "input_ids": ids,
            "is_target": [True] * len(ids),
            "lengths": [len(ids) for ids, _ in documents],
            LOSS_WEIGHT: [weight for _, weight in documents],
        }


def train_weighted(
    student: nn.Module,
    teacher: nn.Module,
    rows: WeightedRows,
    rows_per_step: int,
    objective: Objective,
    learning_rate: float,
    dtype: torch.dtype,
) -> nn.Module:
    """Plain SGD on sum(weight * loss of a token) / number of labels of the step."""
    student, teacher = copy.deepcopy(student).to(dtype), copy.deepcopy(teacher).to(dtype)
    optimizer = torch.optim.SGD(student.parameters(), lr=learning_rate)
    for start in range(0, len(rows), rows_per_step):
        own = [pair for row in rows.documents[start : start + rows_per_step] for pair in row]
        labels = sum(len(ids) - 1 for ids, _ in own)
        for ids, weight in own:
            kd, ce, _ = dense_terms(
                student, teacher, align_collate([{"input_ids": ids}]), objective
            )
            (weight * dense_loss(kd, ce, objective) / labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    return student
