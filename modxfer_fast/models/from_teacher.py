"""A student's first weights from its teacher: whole blocks where widths agree, else embeddings."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from modxfer_fast.config.model import EMBEDDINGS
from modxfer_fast.errors import ModelError
from modxfer_fast.models.architecture import Architecture
from modxfer_fast.models.load import KINDS


class TakenWeights(NamedTuple):
    """Which tensors of a student came from where.

    Attributes:
        copied, projected: how many.
        fresh: names of those that keep their random start.
        energy: share of the squared norm of the teacher's input embeddings that `pca` kept.
    """

    copied: int
    projected: int
    fresh: list[str]
    energy: float | None


@torch.no_grad()
def take_from_teacher(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    *,
    layers: list[int],
    embeddings: str = "copy",
    where: str = "from_teacher",
) -> TakenWeights:
    """Overwrites weights of `student`, a model of the teacher's class with other sizes.

    Args:
        layers: the teacher's block, from 0, for each block of the student; empty for none.
        embeddings: "copy" every tensor outside the blocks; "pca" the rows of every embedding table
            E [n, d_t] as E V, V [d_t, d_s] the leading right singular vectors of the input
            embeddings, the same for positions and types; or "none".
        where: dotted path of the options, for messages.

    Raises:
        ModelError: another architecture, blocks that do not exist, or widths that do not fit.
    """
    if embeddings not in EMBEDDINGS:
        raise ValueError(f"embeddings: expected one of {', '.join(EMBEDDINGS)}, got {embeddings!r}")
    ours, theirs = Architecture.of(student), Architecture.of(teacher)
    if ours.family != theirs.family:
        raise ModelError(
            f"{where}: expected a student of the teacher's architecture {theirs.family}, "
            f"got {ours.family}"
        )
    if layers and len(layers) != ours.num_layers:
        raise ModelError(
            f"{where}.layers: expected a block of the teacher for each of the student's "
            f"{ours.num_layers}, got {len(layers)}"
        )
    if layers and max(layers) >= theirs.num_layers:
        raise ModelError(
            f"{where}.layers: expected blocks 0 to {theirs.num_layers - 1} of the teacher, "
            f"got {max(layers)}"
        )
    if (embeddings == "copy" or layers) and ours.hidden_size != theirs.hidden_size:
        raise ModelError(
            f"{where}: expected the teacher's hidden_size {theirs.hidden_size} for copied weights, "
            f"got {ours.hidden_size}; a narrower student can take embeddings: pca"
        )

    state, source = student.state_dict(), teacher.state_dict()
    copied: set[str] = set()
    blocks = f"{ours.layers}."
    for name, tensor in state.items():
        if name.startswith(blocks):
            number, _, rest = name.removeprefix(blocks).partition(".")
            origin = f"{theirs.layers}.{layers[int(number)]}.{rest}" if layers else None
        else:
            origin = name if embeddings == "copy" else None
        if origin is not None:
            tensor.copy_(_fitting(source.get(origin), tensor, origin, where))
            copied.add(name)
    projected: set[str] = set()
    energy = None
    if embeddings == "pca":
        projected, energy = _project_embeddings(student, teacher, where)
    fresh = [name for name in state if name not in copied and name not in projected]
    return TakenWeights(len(copied), len(projected), fresh, energy)


def check_taken(
    student: PreTrainedConfig,
    teacher: PreTrainedConfig,
    *,
    layers: list[int],
    embeddings: str,
    where: str,
    kind: str = "causal_lm",
) -> None:
    """`take_from_teacher` between models of these configurations without weights, for what it
    raises, that of projected embeddings aside."""
    auto = KINDS[kind][0]
    with torch.device("meta"):
        take_from_teacher(
            auto.from_config(student),
            auto.from_config(teacher),
            layers=layers,
            embeddings="none" if embeddings == "pca" else embeddings,
            where=where,
        )


def _fitting(source: Tensor | None, target: Tensor, name: str, where: str) -> Tensor:
    """`source`, which of positions may hold more rows than the student has."""
    if source is None:
        raise ModelError(f"{where}: expected a tensor {name} in the teacher, found none")
    rows = source[: len(target)] if name.endswith("position_embeddings.weight") else source
    if rows.shape != target.shape:
        raise ModelError(
            f"{where}: expected {name} with the teacher's shape {tuple(source.shape)}, "
            f"got {tuple(target.shape)}"
        )
    return rows


def _project_embeddings(
    student: PreTrainedModel, teacher: PreTrainedModel, where: str
) -> tuple[set[str], float]:
    table = teacher.get_input_embeddings().weight
    width = student.get_input_embeddings().weight.shape[1]
    if width >= table.shape[1]:
        raise ModelError(
            f"{where}.embeddings: expected a student narrower than the teacher's "
            f"{table.shape[1]} for pca, got {width}"
        )
    basis, energy = principal_directions(table, width)
    theirs = dict(teacher.named_modules())
    projected = set()
    for name, module in student.named_modules():
        if isinstance(module, nn.Embedding) and module.weight.shape[1] == width:
            source = getattr(theirs.get(name), "weight", None)
            rows = None if source is None else source.to(basis) @ basis
            module.weight.copy_(_fitting(rows, module.weight, f"{name}.weight", where))
            projected.add(f"{name}.weight")
    # a tied head has the same values under a second name
    pointers = {student.get_parameter(name).data_ptr() for name in projected}
    names = {name for name, p in student.state_dict().items() if p.data_ptr() in pointers}
    return projected | names, energy


def principal_directions(table: Tensor, rank: int) -> tuple[Tensor, float]:
    """Leading right singular vectors [d, rank] of `table` [n, d], and their share of its energy.

    fp64, from the d x d Gram matrix, so that n may be large; each vector's largest entry is
    positive, which makes the signs the same everywhere.
    """
    gram = torch.zeros(table.shape[1], table.shape[1], dtype=torch.float64, device=table.device)
    for rows in table.split(16384):
        rows = rows.double()
        gram.addmm_(rows.T, rows)
    values, vectors = torch.linalg.eigh(gram)
    vectors, values = vectors.flip(1)[:, :rank], values.flip(0).clamp(min=0)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * largest.sign(), float(values[:rank].sum() / values.sum())


def weights_digest(model: nn.Module) -> str:
    """Short hash of a model's weights, names included."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        data = tensor.detach().cpu().contiguous().reshape(-1)
        if data.numel():
            digest.update(memoryview(data.view(torch.uint8).numpy()))
    return digest.hexdigest()[:20]
