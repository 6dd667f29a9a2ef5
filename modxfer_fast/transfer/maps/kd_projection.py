"""Maps from the projections that our own distillation trained beside the student.

A projection W [d_t, d_s] with bias b was trained so that W h_s + b is about h_t for a pair of
hidden states (numbered as in `output_hidden_states`: 0 is the embeddings, i the output of block
i - 1). Hence, for a space in the residual stream,

    read  = g W^T, mean_s = 0, mean_t = g b
    write = the rotation (times one number) from s read to s on what the student produces

with g = 1, or the least-squares gain where the loss compared normalised states and statistics are
given. What a sublayer reads in a pre-norm block is a hidden state behind a norm, so that its length
is another: there the gain is fitted in any case, and statistics are needed. Each space takes the
pair of hidden states nearest to it in relative depth. Spaces that a linear of the block writes
(query, key, value, ffn_gate, ffn_up) follow by pushing the read map through that linear of both
models, P = read W_t^T and R = W_s^T:

    read  = argmin_M E ||s R M - s P||^2        write = the rotation from s P to s R

What no projection reaches, context and ffn_inner behind attention and a non-linearity, is mapped as
by ridge, from statistics.

E is over the student's second moments if statistics are given, else over white features.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modxfer_fast.models.architecture import ROLES, Architecture, without_peft
from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.maps.procrustes import polar
from modxfer_fast.transfer.maps.ridge import Regression

_DEPTH = {"attention_in": 0, "layer_out": 1, "ffn_in": 1, "ffn_out": 1, "attention_out": 1}
_BEHIND_NORM = ("attention_in", "ffn_in")  # of pre-norm blocks
_CHANGES = ("attention_out", "ffn_out")  # added to the stream: they have no share in its offset
_PENALTY = 1e-6


class Projection(NamedTuple):
    """One trained pair: W [d_t, d_s] and b [d_t], fp64, between numbered hidden states."""

    student: int
    teacher: int
    weight: Tensor
    bias: Tensor


class ProjectionMaps:
    """read, write, mean_s and mean_t of any space, from the projections of one distillation.

    Args:
        folder: of the student, with projections.json and projections.safetensors.
        teacher, student: the models; their linears are read for the spaces inside a block.
        moments: (space, student layer, teacher layer) -> Moments or None.

    Raises:
        TransferError: a file is missing or cannot be read, names no layer, or has projections of
            other widths than these models.
    """

    def __init__(self, folder: str | Path, teacher: nn.Module, student: nn.Module, moments):
        self.teacher, self.student = without_peft(teacher), without_peft(student)
        self.teacher_parts = Architecture.of(teacher)
        self.student_parts = Architecture.of(student)
        self.moments = moments
        expected = self.teacher_parts.hidden_size, self.student_parts.hidden_size
        facts_file = Path(folder) / "projections.json"
        try:
            facts = json.loads(_expect(facts_file).read_text(encoding="utf-8"))
            tensors = {}
            if any(layer["projection"] for layer in facts["layers"]):
                tensors = load_file(_expect(facts_file.with_suffix(".safetensors")))
            self.pairs = [_projection(layer, tensors, expected[0]) for layer in facts["layers"]]
            # whether the loss was blind to the length of the states
            self.normalised = facts["norm"] != "none" or facts["loss"] in (
                "cosine",
                "normalized_mse",
            )
        except (KeyError, ValueError, OSError) as error:
            raise TransferError(f"{folder}: projections cannot be read ({error})") from error
        if not self.pairs:
            raise TransferError(f"{facts_file}: expected layers, found none")
        for pair, layer in zip(self.pairs, facts["layers"], strict=True):
            if tuple(pair.weight.shape) != expected:
                got = list(pair.weight.shape) if layer["projection"] else "equal widths"
                raise TransferError(
                    f"projections: expected {list(expected)} for these models, got {got}"
                )

    @staticmethod
    def covers(space: str) -> bool:
        """Whether a map of this space follows from projections of the hidden states."""
        return space in _DEPTH or any(role.writes == space for role in ROLES.values())

    def fit(self, space: str, s: int, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """read [d_s, d_t], write [d_t, d_s], mean_s and mean_t.

        Raises:
            TransferError: a space whose map follows only with statistics that are missing.
        """
        if space in _DEPTH:
            read, offset = self._residual(space, s, t)
            gram = self._student_gram(space, s, t, read)
            write = _rotation(gram, gram @ read, read.T @ gram @ read)
            return read, write, read.new_zeros(read.shape[0]), offset
        role = next(role for role, (_, writes) in ROLES.items() if writes == space)
        reads = ROLES[role].reads
        outer, _ = self._residual(reads, s, t)
        through_t = outer @ self._weight(self.teacher, self.teacher_parts, t, role).T
        through_s = self._weight(self.student, self.student_parts, s, role).T
        gram = self._student_gram(reads, s, t, outer)
        xx, yy = through_s.T @ gram @ through_s, through_t.T @ gram @ through_t
        xy = through_s.T @ gram @ through_t
        read = Regression(xx, xy).solve(_PENALTY)
        zeros = read.new_zeros(read.shape[0]), read.new_zeros(read.shape[1])
        return read, _rotation(xx, xy, yy), *zeros

    def _residual(self, space: str, s: int, t: int) -> tuple[Tensor, Tensor]:
        """read of a space in the residual stream, and the constant that goes with it."""
        depth_s, depth_t = s + _DEPTH[space], t + _DEPTH[space]

        def distance(pair: Projection) -> tuple[float, int, int]:
            """In units of each model's depth."""
            away = abs(pair.student - depth_s) / self.student_parts.num_layers
            away += abs(pair.teacher - depth_t) / self.teacher_parts.num_layers
            return away, pair.student, pair.teacher

        pair = min(self.pairs, key=distance)
        read, bias = pair.weight.T, pair.bias
        if space in _CHANGES:
            bias = torch.zeros_like(bias)
        moments = self.moments(space, s, t)
        is_measured = moments is not None and moments.cov_xx is not None
        post_norm = self.teacher_parts.post_norm and self.student_parts.post_norm
        behind_norm = space in _BEHIND_NORM and not post_norm
        if behind_norm and not is_measured:
            raise TransferError(
                f"statistics: 'kd_projection' expects moments of {space!r}, which in a pre-norm "
                "block is a normalised state, of another size than the hidden states that the "
                "projections are of; got none"
            )
        if behind_norm or (self.normalised and is_measured):
            # where a norm hides the length, t = g (s W^T) has one number left to fit
            power = ((moments.cov_xx @ read) * read).sum()
            gain = (read * moments.cov_xy).sum() / power if power > 0 else torch.tensor(1.0)
            read = read * gain
            bias = moments.mean_y - moments.mean_x @ read
        return read.contiguous(), bias

    def _student_gram(self, space: str, s: int, t: int, read: Tensor) -> Tensor:
        moments = self.moments(space, s, t)
        if moments is None or moments.cov_xx is None:
            return torch.eye(read.shape[0], dtype=read.dtype)
        return moments.cov_xx

    @staticmethod
    def _weight(model: nn.Module, parts: Architecture, layer: int, role: str) -> Tensor:
        return model.get_submodule(parts.module_name(layer, role)).weight.detach().double().cpu()


def _rotation(xx: Tensor, xy: Tensor, yy: Tensor) -> Tensor:
    """M [d_y, d_x] from the second moments of x and y: y M is x turned, and as long on average.

    No regression: a module writes in directions that features without it hardly have, where one
    would be free to be large.
    """
    length = yy.trace()
    ratio = (xx.trace() / length).sqrt() if length > 0 else length
    return ratio * polar(xy).T


def _expect(file: Path) -> Path:
    if not file.is_file():
        raise TransferError(
            f"method: 'kd_projection' expects {file.name} in {file.parent}, as distillation by "
            "hidden states writes it; found none"
        )
    return file


def _projection(layer: dict, tensors: dict[str, Tensor], teacher_width: int) -> Projection:
    name = layer["projection"]
    if name is None:  # states of equal width were compared as they are
        weight = torch.eye(teacher_width, dtype=torch.float64)
    elif f"{name}.weight" in tensors:
        weight = tensors[f"{name}.weight"].double()
    else:
        weight = tensors[f"{name}.up"].double() @ tensors[f"{name}.down"].double()
    bias = tensors.get(f"{name}.bias", torch.zeros(weight.shape[0])).double()
    return Projection(layer["student"], layer["teacher"], weight, bias)
