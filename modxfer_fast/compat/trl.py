"""TRL's distillation losses on our ops, and its trainers with them.

    from modxfer_fast.compat.trl import patch_trl

    print(patch_trl())      # GKDTrainer, GOLDTrainer and DistillationTrainer, from hidden states

The functions have the arguments, defaults and reductions of TRL 1.16.0, also where ours differ:
beta alone chooses the divergence (0 is KL(teacher || student), 1 its reverse), a token whose label
is -100 does not count, "batchmean" without labels divides by the first dimension, and "mean" also
by the number of classes. Importing this module needs torch alone.
"""

import functools
import importlib
import inspect
import logging
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from modxfer_fast.compat.log_probs import jsd_addends
from modxfer_fast.kernels.common import Bend, KDSpec
from modxfer_fast.kernels.common.gathered import full_tensor
from modxfer_fast.kernels.kd_loss import kd_loss
from modxfer_fast.kernels.linear_kd_loss import linear_kd_loss

__all__ = [
    "TrlReport",
    "chunked_divergence_loss",
    "generalized_jsd_loss",
    "patch_trl",
    "unpatch_trl",
]

logger = logging.getLogger(__name__)

_IGNORED = -100
_REDUCTIONS = ("batchmean", "sum", "mean", "none")
_SMALLEST_PROBABILITY = 1e-8  # TRL's, under the logarithm


def generalized_jsd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    beta: float = 0.5,
    temperature: float = 1.0,
    reduction: str = "batchmean",
    num_items_in_batch: Tensor | int | None = None,
    *,
    logits_are_probs: bool = False,
) -> Tensor:
    """Generalised JSD of two tensors of logits; `GKDTrainer.generalized_jsd_loss` of TRL.

    One kernel, `kd_loss`, which stores no probabilities. `reduction="none"` and
    `logits_are_probs=True` are in plain PyTorch with autograd, [..., V] several times.

    Args:
        student_logits: [..., V]. The gradient flows here only.
        teacher_logits: [..., V], a constant.
        labels: [...], of which -100 alone is looked at, or None, as which every token counts.
        beta: the teacher's weight in the mixture, in [0, 1]: 0 is forward KL, 1 reverse KL.
        temperature: divides both logits.
        reduction: "batchmean" divides by the tokens that count, without labels by the first
            dimension; "mean" by those tokens times V; "sum" by nothing. "none" gives the addend of
            every class of the tokens that count.
        num_items_in_batch: divides the sum instead, whatever the reduction.
        logits_are_probs: both are probabilities, which need not sum to 1, and temperature is not
            read; GOLD's.

    Returns:
        Scalar in the dtype of `student_logits`; [..., V] or [tokens that count, V] for "none".

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    valid = None if labels is None else labels != _IGNORED
    if logits_are_probs or reduction == "none":
        addends = _addends(student_logits, teacher_logits, beta, temperature, logits_are_probs)
        if valid is not None:
            addends = addends[valid]
        if reduction == "none" and num_items_in_batch is None:
            return addends.to(student_logits.dtype)
        total = addends.sum()
    else:
        total = kd_loss(
            student_logits,
            teacher_logits,
            labels=None if valid is None else torch.where(valid, 0, _IGNORED),
            divergence="jsd",
            beta=beta,
            temperature=temperature,
            ignore_index=_IGNORED,
            reduction="sum",
        )
    lead, classes = student_logits.shape[:-1], student_logits.shape[-1]
    divisor: Tensor | float
    if num_items_in_batch is not None:
        divisor = torch.as_tensor(num_items_in_batch, device=total.device)
    elif reduction == "mean":
        divisor = (math.prod(lead) if valid is None else valid.sum()) * classes
    elif reduction == "sum":
        divisor = 1.0
    else:
        divisor = max(student_logits.shape[0], 1) if valid is None else valid.sum().clamp(min=1)
    return (total / divisor).to(student_logits.dtype)


def _addends(
    student: Tensor, teacher: Tensor, beta: float, temperature: float, are_probs: bool
) -> Tensor:
    """[..., V] in at least fp32, whose sums over classes are the divergence."""
    KDSpec(divergence="jsd", beta=beta, temperature=temperature).checked()
    dtype = torch.promote_types(student.dtype, torch.float32)
    logs = []
    for values in (student, teacher.detach()):
        values = values.to(dtype)
        if are_probs:
            logs.append(values.clamp(min=_SMALLEST_PROBABILITY).log())
        else:
            logs.append((values / temperature).log_softmax(-1))
    log_q, log_p = logs
    return jsd_addends(log_p, log_q, beta)


def chunked_divergence_loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    beta: float,
    num_items_in_batch: Tensor | int | None = None,
    student_lm_head_bias: Tensor | None = None,
    teacher_lm_head_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    teacher_logit_scale: float = 1.0,
    student_final_logit_softcapping: float | None = None,
    teacher_final_logit_softcapping: float | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Generalised JSD of two heads; `_chunked_divergence_loss` of TRL's DistillationTrainer.

    Four GEMMs, and a fifth for the entropy; none of the backward recomputes logits. A head in
    another dtype than its states is cast to theirs, a DTensor and a head that ZeRO-3 has
    partitioned are gathered once.

    Args:
        student_hidden_states: [B, K, D_s]; the gradient flows here and to the student's head.
        teacher_hidden_states: [B, K, D_t], a constant, as is the teacher's head.
        student_lm_head_weight, teacher_lm_head_weight: [V, D_s] and [V, D_t].
        completion_mask: [B, K], not 0 where a token counts.
        beta: the teacher's weight in the mixture, in [0, 1]: 0 is forward KL, 1 reverse KL.
        num_items_in_batch: divides the sum over tokens; None divides by those that count here.
        student_lm_head_bias, teacher_lm_head_bias: [V] or None.
        student_logit_scale, teacher_logit_scale: factors of the logits, bias included.
        student_final_logit_softcapping, teacher_final_logit_softcapping: soft caps of the scaled
            logits, or None.
        temperature: divides both logits, and those of the entropy.

    Returns:
        (loss, sum of the student's entropies in nats, number of tokens that count), of which the
        loss alone has a gradient.

    Raises:
        ValueError, TypeError: as `linear_kd_loss`.
    """
    of_student = Bend(student_logit_scale, student_final_logit_softcapping)
    of_teacher = Bend(teacher_logit_scale, teacher_final_logit_softcapping)
    student = (student_lm_head_weight, student_lm_head_bias)
    teacher = (teacher_lm_head_weight, teacher_lm_head_bias)
    with _whole(*student, *teacher):
        return _divergence(
            (student_hidden_states, *student, of_student),
            (teacher_hidden_states, *teacher, of_teacher),
            completion_mask,
            beta=beta,
            temperature=temperature,
            num_items=num_items_in_batch,
        )


_Side = tuple[Tensor, Tensor, Tensor | None, Bend]  # states, weight, bias, bend of the logits


def _divergence(
    student: _Side,
    teacher: _Side,
    mask: Tensor,
    *,
    beta: float,
    temperature: float,
    num_items: Tensor | int | None,
    with_entropy: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    of_student, of_teacher = student[3], teacher[3]
    hidden, weight, bias = _plain(*student[:3])
    teacher_hidden, teacher_weight, teacher_bias = _plain(*teacher[:3])
    valid = mask != 0
    count = valid.sum()
    num_valid = int(count)  # one wait on a GPU; then neither prompt nor padding reaches a GEMM
    options: dict[str, Any] = {
        "labels": torch.where(valid, 0, _IGNORED),
        "ignore_index": _IGNORED,
        "num_valid": num_valid,
        "temperature": temperature,
        "student_bias": bias,
        **of_student.options("student"),
    }
    divisor = count if num_items is None else num_items
    loss = linear_kd_loss(
        hidden,
        weight,
        teacher_hidden,
        teacher_weight,
        teacher_bias=teacher_bias,
        divergence="jsd",
        beta=beta,
        normalizer=torch.as_tensor(divisor, device=hidden.device).reshape(()),
        **options,
        **of_teacher.options("teacher"),
    )
    entropy = loss.new_zeros(())
    if with_entropy:
        with torch.no_grad():
            # H(q) = log V - KL(q || uniform): a teacher of no width has logits of 0
            to_uniform = linear_kd_loss(
                hidden,
                weight,
                hidden[..., :0],
                weight[:, :0],
                divergence="reverse_kl",
                reduction="sum",
                **options,
            )
            entropy = num_valid * math.log(weight.shape[0]) - to_uniform
    return loss, entropy, count


def _plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Whole tensors of one dtype."""
    weight, bias = full_tensor(weight), full_tensor(bias)
    if not torch.is_autocast_enabled(hidden.device.type):
        weight = weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
    return hidden, weight, bias


def _whole(*parameters: Any) -> AbstractContextManager:
    """Parameters that ZeRO-3 has partitioned are whole inside; the gradient is made there too."""
    if not any(hasattr(parameter, "ds_status") for parameter in parameters):
        return nullcontext()
    from trl.trainer.utils import maybe_gather_lm_head_ctx

    return maybe_gather_lm_head_ctx(*parameters)


# --- the trainers


@dataclass(frozen=True)
class TrlReport:
    """What `patch_trl` did; printed, a line each. A context manager that undoes it at its end.

    Attributes:
        patched: what runs on ours, e.g. "GKDTrainer.compute_loss".
        skipped: (name, reason) of what was left as it is.
        already_patched: the call found nothing to change.
        declined: {reason: number} of the calls, since then, that TRL computed itself.
    """

    patched: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    already_patched: bool = False
    declined: Counter[str] = field(default_factory=Counter, compare=False)
    _undo: list[Callable[[], None]] = field(default_factory=list, repr=False, compare=False)

    def unpatch(self) -> None:
        """Gives TRL back what this call changed; a second time does nothing."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> "TrlReport":
        return self

    def __exit__(self, *exception) -> None:
        self.unpatch()

    def __str__(self) -> str:
        state = ", was patched already" if self.already_patched else ""
        lines = [f"TRL on modxfer_fast: {len(self.patched)} functions{state}"]
        lines += [f"  {name}" for name in self.patched]
        lines += [f"  left to TRL: {name}: {reason}" for name, reason in self.skipped]
        lines += [f"  {number} calls left to TRL: {why}" for why, number in self.declined.items()]
        return "\n".join(lines)


class _Declined(Exception):
    """This call is TRL's, and why."""


_MARK = "_modxfer_fast_original"
_PATCHES: list[Callable[[], None]] = []


def patch_trl() -> TrlReport:
    """Runs the losses of TRL's trainers on ours, from hidden states, for every trainer there is.

    `DistillationTrainer` computes its chunked divergence by `chunked_divergence_loss`. `GKDTrainer`
    and `GOLDTrainer` take the hidden states of both models and their heads instead of logits, in
    their `compute_loss`, and `generalized_jsd_loss` is ours wherever else they call it. Values are
    TRL's up to rounding, of which there is less: logits are never rounded to half precision.

    A call that ours does not cover is TRL's own, and the report counts it with its reason: outputs
    are asked for, images beside the text, GOLD's loss across tokenizers, a head with an adapter or
    quantised, logits that are not states times head, `nn.DataParallel`.

    Returns:
        A report that prints what was patched and why the rest was not, and that can `unpatch()`.

    Raises:
        ModuleNotFoundError: trl is not installed.
    """
    importlib.import_module("trl")
    patched, skipped, undo = [], [], []
    declined: Counter[str] = Counter()
    found = 0
    for name, place, make in _targets():
        owner, attribute, reason = place()
        if reason:
            skipped.append((name, reason))
            continue
        found += 1
        original = inspect.getattr_static(owner, attribute)
        function = getattr(owner, attribute)
        if hasattr(function, _MARK):
            patched.append(name)
            continue
        try:
            replacement = make(function, declined)
        except _Declined as no:
            skipped.append((name, str(no)))
            continue
        setattr(replacement, _MARK, original)
        is_static = isinstance(original, staticmethod)
        setattr(owner, attribute, staticmethod(replacement) if is_static else replacement)
        patched.append(name)
        undo.append(functools.partial(_restore, owner, attribute, replacement, original))
    _PATCHES.extend(undo)
    report = TrlReport(
        patched=tuple(patched),
        skipped=tuple(skipped),
        already_patched=found > 0 and not undo,
        declined=declined,
        _undo=list(undo),
    )
    logger.info("%s", report)
    return report


def unpatch_trl() -> None:
    """Gives TRL's trainers their own losses again, whoever patched them."""
    while _PATCHES:
        _PATCHES.pop()()


def _restore(owner: Any, attribute: str, replacement: Callable, original: Any) -> None:
    if getattr(owner, attribute) is replacement:  # what was put over ours stays
        setattr(owner, attribute, original)


_Place = Callable[[], tuple[Any, str, str]]
_Make = Callable[[Callable, Counter], Callable]


def _targets() -> Iterator[tuple[str, _Place, _Make]]:
    """(name, place: owner, attribute and why it is not there, how the replacement is made)."""
    gkd = ("trl.experimental.gkd.gkd_trainer", "GKDTrainer")
    gold = ("trl.experimental.gold.gold_trainer", "GOLDTrainer")
    chunked = ("trl.trainer.distillation_trainer", "")
    for (module, trainer), attribute, make in (
        (chunked, "_chunked_divergence_loss", _make_chunked),
        (gkd, "generalized_jsd_loss", _make_jsd),
        (gkd, "compute_loss", functools.partial(_make_compute_loss, _gkd_temperature)),
        (gold, "generalized_jsd_loss", _make_jsd),
        (gold, "compute_loss", functools.partial(_make_compute_loss, _gold_temperature)),
    ):
        name = f"{trainer or 'DistillationTrainer'}.{attribute}"
        yield name, functools.partial(_place, module, trainer, attribute), make


def _place(module: str, trainer: str, attribute: str) -> tuple[Any, str, str]:
    try:
        owner: ModuleType | type = importlib.import_module(module)
    except ImportError as error:
        return None, attribute, f"this TRL has no {module} here ({error})"
    owner = getattr(owner, trainer) if trainer else owner
    if not hasattr(owner, attribute):
        return None, attribute, f"this TRL's {module} has no {attribute}"
    return owner, attribute, ""


def _parameters(function: Callable) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _make_chunked(function: Callable, declined: Counter) -> Callable:
    known = _parameters(chunked_divergence_loss)
    if _parameters(function) != known:
        raise _Declined(f"its arguments are {', '.join(_parameters(function))}")

    @functools.wraps(function)
    def loss(*args, **kwargs):
        return chunked_divergence_loss(*args, **kwargs)

    return loss


def _make_jsd(function: Callable, declined: Counter) -> Callable:
    # GOLD's has one argument more, in the middle
    names = _parameters(function)
    unknown = set(names) - set(_parameters(generalized_jsd_loss))
    if unknown:
        raise _Declined(f"its arguments {', '.join(sorted(unknown))} are not ours")

    @functools.wraps(function)
    def loss(*args, **kwargs):
        return generalized_jsd_loss(**dict(zip(names, args, strict=False)), **kwargs)

    return loss


def _gkd_temperature(trainer: Any, inputs: dict) -> float:
    return 1.0  # its own temperature is that of generation alone


def _gold_temperature(trainer: Any, inputs: dict) -> float:
    if trainer.use_uld_loss and trainer.teacher_tokenizer is not None:
        raise _Declined("GOLD's loss across tokenizers compares logits")
    if trainer._get_model_forward_kwargs(inputs):
        raise _Declined("images beside the text")
    return trainer.temperature


def _make_compute_loss(
    temperature_of: Callable[[Any, dict], float], function: Callable, declined: Counter
) -> Callable:
    if _parameters(function) != (
        *("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    ):
        raise _Declined(f"its arguments are {', '.join(_parameters(function))}")
    try:
        from trl.models.utils import _ForwardRedirection

        # which tries whether a model's logits are its states times its head
        from modxfer_fast.engine.students.causal_lm import SplitCausalLM
    except ImportError as error:
        raise _Declined(f"{error}; pip install 'modxfer-fast[engine]'") from error
    redirect = _ForwardRedirection()
    parts: weakref.WeakKeyDictionary[nn.Module, SplitCausalLM | str] = weakref.WeakKeyDictionary()

    def split(model: nn.Module, role: str) -> SplitCausalLM:
        if model not in parts:
            try:
                with _without_autocast(model):
                    parts[model] = SplitCausalLM.of(model, role)
            except (TypeError, ValueError) as error:
                parts[model] = str(error)
        found = parts[model]
        if isinstance(found, str):
            raise _Declined(found)
        return found

    def from_hidden_states(trainer, model, inputs, num_items) -> Tensor:
        temperature = temperature_of(trainer, inputs)
        if isinstance(model, nn.DataParallel):
            raise _Declined("nn.DataParallel")
        student_model = trainer.accelerator.unwrap_model(model)
        teacher_model = trainer.accelerator.unwrap_model(trainer.teacher_model)
        student, teacher = split(student_model, "student"), split(teacher_model, "teacher")
        if student.classes != teacher.classes:
            raise _Declined(
                f"the student has {student.classes} classes, the teacher {teacher.classes}"
            )
        trainer.teacher_model.eval()

        def run(input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
            # position i predicts the token at i + 1
            hidden = student.hidden(input_ids, attention_mask)[:, :-1]
            with torch.no_grad():
                target = redirect(
                    trainer.teacher_model, teacher_model, teacher.hidden, input_ids, attention_mask
                )[:, :-1]
            with _whole(*student.head.parameters(False), *teacher.head.parameters(False)):
                loss, _, _ = _divergence(
                    (hidden, *student.weight_and_bias(), student.bend),
                    (target, *teacher.weight_and_bias(), teacher.bend),
                    labels[:, 1:] != _IGNORED,
                    beta=trainer.beta,
                    temperature=temperature,
                    num_items=num_items,
                    with_entropy=False,
                )
            return loss

        def autocast(*batch: Tensor) -> Tensor:
            # in the place of a model's forward, which accelerate would have put into it
            with trainer.accelerator.autocast():
                return run(*batch)

        batch = (inputs[name] for name in ("input_ids", "attention_mask", "labels"))
        return redirect(model, student_model, autocast, *batch)

    @functools.wraps(function)
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        try:
            if return_outputs:
                raise _Declined("the outputs are asked for")
            return from_hidden_states(self, model, inputs, num_items_in_batch)
        except _Declined as no:
            _count(declined, f"{type(self).__name__}: {no}")
            return function(self, model, inputs, return_outputs, num_items_in_batch)

    return compute_loss


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """The model's own forward in the place of accelerate's, which rounds under mixed precision."""
    own = model.__dict__.get("_original_forward")
    if own is None:
        yield
        return
    wrapped = model.forward
    model.forward = own
    try:
        yield
    finally:
        model.forward = wrapped


def _count(declined: Counter, reason: str) -> None:
    if not declined[reason]:
        logger.warning("left to TRL: %s", reason)
    declined[reason] += 1
