"""A linear classifier on the last hidden state through the read map of that state.

W_s = W_t read^T     b_s = b_t + W_t offset
"""

from collections.abc import Mapping

from torch import Tensor

from modxfer_fast.models.architecture import Architecture
from modxfer_fast.transfer.errors import TransferError
from modxfer_fast.transfer.maps import Maps
from modxfer_fast.transfer.modules import PeftModuleState


def rewrite_head(
    module: PeftModuleState, maps: Maps, student: Architecture
) -> Mapping[str, Tensor]:
    """The student's head, named as the teacher's.

    Raises:
        TransferError: a head that is more than one linear on the last block's output.
    """
    names = {name.rpartition(".")[2]: name for name in module.head}
    if set(names) not in ({"weight"}, {"weight", "bias"}) or len(names) != len(module.head):
        raise TransferError(
            "head: 'transport' expects a head that is one linear, got "
            f"{', '.join(module.head) or 'none'} in the module; use 'fresh'"
        )
    task = getattr(module.config.task_type, "value", module.config.task_type)
    if task != "TOKEN_CLS" or not (module.architecture.post_norm and student.post_norm):
        raise TransferError(
            "head: 'transport' expects a token classifier that reads the output of the last block "
            f"in both models, got the task {task} of a {module.architecture.family} model for a "
            f"{student.family} model; use 'fresh'"
        )
    entry = maps["layer_out", student.num_layers - 1, module.architecture.num_layers - 1]
    weight = module.head[names["weight"]]
    head = {names["weight"]: entry.read_weight(weight).to(weight.dtype)}
    if "bias" in names:
        bias = module.head[names["bias"]]
        head[names["bias"]] = (bias.double() + weight.double() @ entry.offset).to(bias.dtype)
    return head
