"""Distillation of encoders from hidden states written out by hand, in any precision."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModel

from modxfer_fast.data import EncoderCollator
from tests.encoder_models import tiny_encoder

PAIRS = {"layers": {1: 1, 2: 3}, "weight": {1: 0.5, 2: 2.0}, "bias": True}
STEPS, ROWS_PER_STEP = 3, 8
LEARNING_RATE = 0.3
COLLATOR = EncoderCollator(pad_token_id=1)


class Texts(Dataset):
    """Rows of random ids, of different lengths."""

    def __init__(self, size: int, seed: int = 0):
        draw = torch.Generator().manual_seed(seed)
        lengths = torch.randint(3, 20, (size,), generator=draw).tolist()
        self.rows = [torch.randint(4, 97, (n,), generator=draw).tolist() for n in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": self.rows[index]}


TRAIN, HELD_OUT = Texts(STEPS * ROWS_PER_STEP), Texts(11, seed=3)


def teacher_model(family="bert"):
    return tiny_encoder(AutoModel, family, 48, 3, seed=1)


def student_model(family="bert", auto_class=AutoModel):
    return tiny_encoder(auto_class, family)


def projections_of(run) -> dict:
    prefix = "hidden.projections."
    state = run.model.features.state_dict()
    return {name.removeprefix(prefix): value.clone() for name, value in state.items()}


def pair_rows(student, teacher, projections, batch):
    """{pair: (projected, target)}, each [tokens, D_t]."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ours = student(**inputs, output_hidden_states=True).hidden_states
    with torch.no_grad():
        theirs = teacher(**inputs, output_hidden_states=True).hidden_states
    mask = batch["attention_mask"].bool()
    return {
        (s, t): (
            F.linear(ours[s], projections[f"{s}_{t}.weight"], projections[f"{s}_{t}.bias"])[mask],
            theirs[t][mask],
        )
        for s, t in PAIRS["layers"].items()
    }


def weighted_loss(rows) -> torch.Tensor:
    """Sum over tokens of the weighted mean over pairs."""
    losses = [
        PAIRS["weight"][s] * (z - target).square().mean(-1).sum()
        for (s, _), (z, target) in rows.items()
    ]
    return sum(losses) / len(losses)


def train_by_hand(projections, dtype):
    student, teacher = student_model().to(dtype).train(), teacher_model().to(dtype).eval()
    projections = {k: v.clone().to(dtype).requires_grad_() for k, v in projections.items()}
    params = [*student.parameters(), *projections.values()]
    optimizer = torch.optim.SGD(params, lr=LEARNING_RATE)
    for first in range(0, len(TRAIN), ROWS_PER_STEP):
        batch = COLLATOR([TRAIN[i] for i in range(first, first + ROWS_PER_STEP)])
        loss = weighted_loss(pair_rows(student, teacher, projections, batch))
        (loss / batch["num_tokens"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: param.detach() for name, param in student.named_parameters()}
    return weights | {k: v.detach() for k, v in projections.items()}


def assert_trained_by_hand(got: dict[str, Tensor], projections: dict[str, Tensor]) -> None:
    """Raises unless weights and projections are those of `train_by_hand`, within rounding.

    Args:
        projections: those at start.
    """
    start = dict(student_model().named_parameters()) | projections
    truth, yardstick = (train_by_hand(projections, d) for d in (torch.float64, torch.float32))
    moved = 0
    for name, expected in truth.items():
        error = (got[name].detach().double() - expected).abs().max().item()
        own = (yardstick[name].double() - expected).abs().max().item()
        budget = 2 * own + 8 * torch.finfo(torch.float32).eps * expected.abs().max().item()
        assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"
        moved += (expected - start[name].detach()).abs().max().item() > 20 * budget
    assert moved > 30  # all but the pooler and the positions that no row has
