"""KD loss from hidden states and output heads, with its gradient computed in the forward.

N rows (B*T tokens)   V classes   D_s, D_t widths   p teacher   q student

    z_s = student_hidden student_weight^T + student_bias         z_t likewise
    z = cap tanh(scale z / cap)                                  of a model that has either
    loss = sum_n row_weight_n (kd_weight D(p_n, q_n) + ce_weight CE(softmax(z_s,n), label_n)
                               + z_loss_weight (log sum exp z_s,n)^2)

D and its conventions are those of `kd_loss`. Fused: both projections, the loss, and the gradients
of student_hidden, student_weight and student_bias; logits [N, V] exist for one chunk of rows at a
time and are fp32 at the softmax whatever the dtype of the heads (bf16 logits cost 3 to 150 % of
gradient accuracy as the student nears the teacher). See stream.py for the loop.

FLOPs: 2 N V (3 D_s + D_t); 2 N V (2 D_s + D_t) when the head is frozen; 2 N V (D_s + D_t) without
gradient. With gradients="recompute", and for a per-token loss (reduction="none"), the backward
makes the logits again: + 2 N V (D_s + D_t).
Limits: classes of one vocabulary, or a part of it; no gradient to the teacher; no double backward.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec

import torch
from torch import Tensor

from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.common import (
    KDSpec,
    check_label_values,
    check_num_valid,
    check_reduction,
    check_temperatures,
    check_tensor,
    combine_row_weights,
    counted_rows,
    debug_check_finite,
    denominator,
    refuse_transforms,
    saved_dtype,
    valid_rows,
    without_autocast,
)
from modxfer_fast.kernels.common.composed_head import (
    ComposedHead,
    QuantizedWeight,
    head_of,
    quantized_in,
)
from modxfer_fast.kernels.common.head import Head
from modxfer_fast.kernels.common.parallel_head import ParallelHead, Weight
from modxfer_fast.kernels.common.rows import Launch, Rows, Tokens
from modxfer_fast.kernels.common.streamed_op import StreamedOp, inputs_of
from modxfer_fast.kernels.divergences import DivergenceOption
from modxfer_fast.kernels.kd_loss.topk import TeacherTopK
from modxfer_fast.kernels.linear_kd_loss import parallel
from modxfer_fast.kernels.linear_kd_loss.mixture import Mixture, refuse_without_logits
from modxfer_fast.kernels.linear_kd_loss.teachers import (
    BY_PRODUCTS,
    NoTeacher,
    Teacher,
    Values,
    refuse_bend,
    teacher_of,
)
from modxfer_fast.kernels.linear_kd_loss.vocabulary import Vocabulary

Arguments = ParamSpec("Arguments")


class ByProducts(NamedTuple):
    """What the rows of a loss showed on the way, detached; [...] each, 0 where a token is ignored.

    Attributes:
        lse: log sum exp of the student's logits at temperature 1.
        label_log_prob: log-probability of the label under the student at temperature 1; 0 without
            labels.
        label_is_top: 1 where the label's logit is the student's largest, or one of several.
        student_entropy: of q, the student's softmax at the temperature of the divergence, in nats.
        teacher_entropy: of p, likewise; of a `TeacherTopK` that of the K + 1 classes of a bucket,
            or the addends of those listed. None without a teacher.
        agreement: 1 where a class with the student's largest logit has the teacher's largest too.
            None without a teacher.
        student_mass: sum of q over the classes that a `TeacherTopK` lists; None for others.
        teacher_mass: sum of its probabilities, as they were given; None for others.
    """

    lse: Tensor
    label_log_prob: Tensor
    label_is_top: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor | None = None
    agreement: Tensor | None = None
    student_mass: Tensor | None = None
    teacher_mass: Tensor | None = None


class KDTerms(NamedTuple):
    """The loss with its gradient, and its detached parts for logs.

    Attributes:
        loss: fp32 scalar, or one value a token for reduction="none".
        kd: fp32 scalar, mean divergence over the tokens that count, unweighted.
        ce: fp32 scalar, mean cross entropy over the same tokens, with its label smoothing; 0 when
            ce_weight is 0.
        z_loss: fp32 scalar, mean of (log sum exp z)^2 likewise; 0 when z_loss_weight is 0, None
            where it is not computed.
        by_products: of each token, where they are asked for.
    """

    loss: Tensor
    kd: Tensor
    ce: Tensor
    z_loss: Tensor | None = None
    by_products: ByProducts | None = None


def linear_kd_loss(
    student_hidden: Tensor,
    student_weight: Weight,
    teacher_hidden: Tensor | Teacher,
    teacher_weight: Weight | None = None,
    *,
    labels: Tensor | None = None,
    divergence: DivergenceOption = "forward_kl",
    alpha: float | None = None,
    beta: float | None = None,
    temperature: float | Tensor = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_logit_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    teacher_softcap: float | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    scale_by_temperature_squared: bool = False,
    workspace_mb: int | None = None,
    gradients: str = "forward",
    filter_eps: float | None = None,
    num_valid: int | None = None,
    vocabulary: str = "equal",
    teacher_ids: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Distillation loss of a student's head against a teacher's, without storing their logits.

    Args:
        student_hidden: [..., D_s], fp64, fp32, fp16 or bf16.
        student_weight: [V, D_s], dtype of student_hidden. Frozen (requires_grad=False), its GEMM
            is not computed. Tied to an embedding, it receives the sum of both gradients from
            autograd. Or a `LoraWeight`, a `QuantizedWeight`, or a `VocabParallelWeight`.
        teacher_hidden: [..., D_t], same leading dimensions; D_t and dtype may differ. A constant.
            Or a teacher of another kind: `TeacherLogits`, `TeacherLogProbs`, `TeacherProbs`,
            `TeacherTopK` of K classes a row, or several as a `TeacherMixture`.
        teacher_weight: [V, D_t], dtype of teacher_hidden. None beside a teacher of another kind.
        labels: [...] int64, aligned with the hidden states (no shift is made). Rows with
            `ignore_index` count nowhere and are packed away. Needed when `ce_weight` is not 0.
        divergence: a name of `modxfer_fast.kernels.divergences.DIVERGENCES`, where its formula
            stands, such as "forward_kl", "reverse_kl" or "jsd". Or weights of several by name,
            {"forward_kl": 0.7, "reverse_kl": 0.3}, whose sum takes one pass over the logits; those
            that are sums over the classes themselves. "logits_mse" and "logits_cosine" are of the
            logits divided by the temperature, and need a teacher that gives logits.
        alpha, beta: parameters of some divergences, an error beside another. None is what the
            divergence's record has. In "jsd" beta is the teacher's weight in the mixture, in
            [0, 1]; there 0 is forward KL and 1 is reverse KL.
        temperature: divides both logits in the divergence; the cross entropy stays at 1. One
            number, or a tensor [...] of a positive one a token: a constant, which beside a
            `TeacherTopK` needs the tail "renormalise", or lists of those temperatures.
        kd_weight, ce_weight: factors of the two terms.
        label_smoothing: in [0, 1], the share of the label's probability in the cross entropy that
            goes to all V classes alike (Szegedy et al. 2016), as in torch.
        z_loss_weight: at least 0, factor of (log sum exp z)^2 of the student's logits at
            temperature 1 (the z-loss of PaLM, Chowdhery et al. 2022, section 5). Needs no labels.
        student_bias, teacher_bias: [V], dtypes of their weights; [V_r] beside VocabParallelWeight.
        student_logit_scale, student_softcap: what the student's model does to the logits z of its
            head, bias included: cap tanh(scale z / cap), as in Gemma 2; None is no cap. Of an
            infinite logit nothing changes: -inf excludes its class.
        teacher_logit_scale, teacher_softcap: the same of the teacher's, if it has a head.
        token_weights: [...], multiplies each token's loss; does not enter the mean's denominator. A
            constant.
        normalizer: positive number or 0-d tensor that replaces the mean's denominator, the number
            of tokens that count. Under gradient accumulation: the tokens of the whole step. A
            tensor of 0, a step without tokens, divides by 1.
        reduction: "mean", "sum", or "none" (shape [...]), whose backward recomputes the logits
            because each token brings a gradient of its own.
        scale_by_temperature_squared: multiplies the divergence by temperature squared
            (Hinton et al. 2015), of each token its own. Off by default, as in TRL and Liger.
        workspace_mb: MiB for the logits in flight; the peak above inputs and gradients. None is
            256, on a GPU 512 and at least what 1024 rows take, 8 bytes a class each: 1002 MiB for
            128,256 classes. Larger is faster until a chunk holds a thousand rows or so, on a CPU a
            few hundred. A trainable half-precision head needs more, and an fp16 one keeps 4 V D_s
            bytes of it until the backward: on a CPU 4 V D_s bytes for the fp32 sum of its gradient;
            on a GPU 2 V bytes a row for dlogits, up to 8 V D_s in all, with the sum where there is
            one. A frozen one needs 2 V bytes for each of 2^22 / D_s rows of dlogits on a GPU, if a
            chunk is half as large or less. What exceeds half of the workspace comes on top of it.
        gradients: when they are made. "forward": in the forward, which leaves those of hidden
            states and head to the backward. "recompute": in the backward, which makes the logits
            again, chunk by chunk; no gradient exists before it, and the time between the two is
            free of their memory. The same bits either way. Where none is wanted, under
            torch.no_grad say, none is made.
        filter_eps: classes of which no row of a chunk has dlogits of at least so much, in units of
            the row's factor in the loss (1 / N in a plain mean), are left out of the products of
            the gradients: their heads' and hidden states' gradients lack at most that
            (class_filter.py has the bounds), the loss nothing. None: nothing is left out. 2.4e-4
            is what Cut Cross-Entropy takes beside bf16. A GPU waits once a chunk for the number
            of classes.
        num_valid: number of labels that are not `ignore_index`, when the caller knows it on the
            host (a collator does). A GPU cannot pack rows without it and then runs all of them.
        vocabulary: "equal", where another number of the teacher's classes is an error; or "common",
            where the leading classes that both have are compared, and the rest is masked on both
            sides, in the cross entropy too: heads of one tokenizer padded to different sizes.
        teacher_ids: [V] int64, the teacher's class of each of the student's, for a student whose
            vocabulary is a part of the teacher's; the teacher's other classes are masked.
        backend: "triton", "cuda", "cpp" or "reference"; None takes the best available.
            "cuda" runs by name alone.

    Returns:
        fp32 scalar, or [...] for reduction="none" (fp64 for fp64 inputs). 0 if no token counts. A
        counting token whose logits hold NaN or +inf, on either side, is NaN.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came. Values of
            labels, temperatures, num_valid and a normalizer tensor are checked on a CPU, on a GPU
            only under MODXFER_DEBUG=1.
        RuntimeError: under torch.func's gradients or forward-mode differentiation.
        BackendError: the backend asked for cannot run these inputs.

    Under `torch.autocast` the student's hidden states and head are cast as `F.linear` would.
    """
    return loss_alone(
        head_of(student_hidden, student_weight, student_bias),
        teacher_of(teacher_hidden, teacher_weight, teacher_bias),
        KDSpec(
            divergence,
            alpha=alpha,
            beta=beta,
            temperature=temperature,
            kd_weight=kd_weight,
            ce_weight=ce_weight,
            label_smoothing=label_smoothing,
            z_loss_weight=z_loss_weight,
            student_logit_scale=student_logit_scale,
            student_softcap=student_softcap,
            teacher_logit_scale=teacher_logit_scale,
            teacher_softcap=teacher_softcap,
            scale_by_temperature_squared=scale_by_temperature_squared,
        ),
        Tokens(labels, token_weights, normalizer, reduction, ignore_index, num_valid),
        Launch(workspace_mb, backend, gradients, filter_eps),
        Vocabulary(vocabulary, teacher_ids),
    )


_ARGUMENTS = frozenset(inspect.signature(linear_kd_loss).parameters)


def _arguments_of(
    loss: Callable[Arguments, Tensor],
) -> Callable[[Callable[..., KDTerms]], Callable[Arguments, KDTerms]]:
    """Gives what is decorated the signature of `loss`, with `by_products` at its end."""

    def declare(terms: Callable[..., KDTerms]) -> Callable[Arguments, KDTerms]:
        signature = inspect.signature(loss)
        by_products = inspect.signature(terms).parameters["by_products"]
        signature = signature.replace(
            parameters=[*signature.parameters.values(), by_products], return_annotation=KDTerms
        )
        terms.__signature__ = signature  # type: ignore[attr-defined]
        return terms

    return declare


@_arguments_of(linear_kd_loss)
def linear_kd_loss_terms(
    student_hidden,
    student_weight,
    teacher_hidden,
    teacher_weight=None,
    *,
    student_bias=None,
    teacher_bias=None,
    by_products: bool = False,
    **options,
):
    """`linear_kd_loss` with its parts beside it; same arguments and errors.

    Args:
        by_products: whether entropies, agreement, log-probabilities and masses of each token come
            too, without waiting for the device; from the same pass over the logits, except beside a
            `TeacherTopK`, for which there is one more, and a second at a temperature other than 1.
    """
    kinds: tuple[Any, ...] = (KDSpec, Tokens, Launch, Vocabulary)
    spec, tokens, launch, vocabulary = (
        kind(**{name: options[name] for name in kind.__annotations__ if name in options})
        for kind in kinds
    )
    if unknown := options.keys() - _ARGUMENTS:
        raise TypeError(
            f"linear_kd_loss_terms: expected options of linear_kd_loss, got {', '.join(unknown)}"
        )
    student = head_of(student_hidden, student_weight, student_bias)
    teacher = teacher_of(teacher_hidden, teacher_weight, teacher_bias)
    return loss_of_heads(student, teacher, spec, tokens, launch, vocabulary, by_products)


def loss_of_heads(
    student: Any,
    teacher: Teacher,
    spec: KDSpec,
    tokens: Tokens,
    launch: Launch,
    vocabulary: Vocabulary | None = None,
    by_products: bool = False,
) -> KDTerms:
    """`linear_kd_loss_terms` of what its arguments make.

    A student or teacher of another kind than `Head` is one that `streamed` has registered. Fields
    that are no tensors cross the op's boundary as they are.
    """
    return _computed(student, teacher, spec, tokens, launch, vocabulary, by_products)[1]()


def loss_alone(
    student: Any,
    teacher: Teacher,
    spec: KDSpec,
    tokens: Tokens,
    launch: Launch,
    vocabulary: Vocabulary | None = None,
) -> Tensor:
    """The loss of `loss_of_heads` without its terms, each of which takes operators of its own."""
    return _computed(student, teacher, spec, tokens, launch, vocabulary, False)[0]


@parallel.told_to_ranks
def _computed(
    student: Any,
    teacher: Teacher,
    spec: KDSpec,
    tokens: Tokens,
    launch: Launch,
    vocabulary: Vocabulary | None,
    by_products: bool,
) -> tuple[Tensor, Callable[[], KDTerms]]:
    """The loss, and what makes its terms."""
    role = "" if isinstance(teacher, NoTeacher) else "student"
    hidden = "student_hidden" if role else "hidden"
    given = tensors_of(role, student) | tensors_of("teacher", teacher)
    for name, tensor in given.items():
        check_tensor(name, tensor)
    constants = (spec.temperature, tokens.token_weights, tokens.normalizer)
    room = "linear_kd_loss" if role else "linear_cross_entropy"
    refuse_transforms(room, *given.values(), *constants)
    spec.student_bend.check(role)
    given_spec, spec = spec, spec.checked()
    labels, token_weights, normalizer, reduction, ignore_index, num_valid = tokens
    check_reduction(reduction, normalizer)
    student, teacher = student.cast(), teacher.detach().cast()
    student.check(role)
    teacher.check("teacher")
    if not isinstance(teacher, NoTeacher):
        vocabulary = vocabulary or Vocabulary()
        vocabulary.check()
        student, teacher = vocabulary.matched(student, teacher)
    teacher.check_teacher(student)
    if isinstance(teacher, TeacherTopK):
        teacher = teacher.beside(student.hidden.dtype)
    teacher = parallel.teacher_beside(student, teacher)
    softening = given_spec.softened(hidden, student.hidden)
    if isinstance(student, ParallelHead):
        parallel.refuse_options(launch)
    refuse_bend(teacher, spec)
    if by_products and isinstance(teacher, Mixture) and teacher.of == "losses":
        raise ValueError(
            "by_products: expected one teacher's probabilities, got a TeacherMixture of losses"
        )
    refuse_without_logits(teacher, spec)
    tokens.check(spec.ce_weight, hidden, student.hidden)
    launch.check()
    read = [t for t in tensors_of("teacher", teacher).values() if t.is_floating_point()]
    backend = dispatch.resolve("linear_kd_loss", student.hidden, *read[:1], backend=launch.backend)

    lead = student.hidden.shape[:-1]
    student, teacher = student.flat(math.prod(lead)), teacher.flat(math.prod(lead))
    labels = None if labels is None else labels.reshape(-1)
    valid = valid_rows(labels, ignore_index)
    dtype = torch.promote_types(student.hidden.dtype, torch.float32)
    weights = combine_row_weights(valid, token_weights, student.hidden, dtype)
    divisor = denominator(reduction, normalizer, valid, student.hidden, dtype)
    # fp16 would lose gradients of size 1/N: there the normaliser joins the upstream gradient, and
    # the parameters' sums over all tokens stay in fp32 until it has come
    late = divisor if student.hidden.dtype == torch.float16 else None
    if divisor is not None and late is None:
        weights = weights / divisor

    op = _OPS[type(student), type(teacher)]
    inputs = op.inputs(
        *(*student, *teacher, labels, weights, ignore_index, num_valid, softening),
        *(spec.numbers(), spec.names()),
        *launch._replace(backend=backend),
        by_products,
    )
    loss, kd, ce, z_loss, found = op(inputs, reduction)
    if reduction == "none":
        loss = loss.reshape(lead)
    elif late is not None:
        loss = loss / late

    def terms() -> KDTerms:
        count = divisor
        if count is None or normalizer is not None:
            count = counted_rows(valid, student.hidden, dtype)
        mean_kd, mean_ce, mean_z_loss = (term.sum() / count for term in (kd, ce, z_loss))
        of_tokens = None
        if by_products:
            columns = found.T.reshape(found.shape[1], *lead)
            named = zip(BY_PRODUCTS[teacher.row_kernel], columns, strict=True)
            of_tokens = ByProducts(**dict(named))
        return KDTerms(loss, mean_kd, mean_ce, mean_z_loss, of_tokens)

    return loss, terms


_LISTS = ("parts", "tensors")  # fields of heads and teachers that are lists of tensors
_OPTIONS = ("numbers", "bends", "sizes")  # those that are lists of numbers


def tensors_of(role: str, head: Any) -> dict[str, Tensor]:
    """What of a head or teacher is to be a tensor, and is there, as `<role>_<field>`.

    Whatever is no option is to be one: an nn.Linear in place of its weight is found here. Options
    in lists are not looked at.
    """
    found: dict[str, Tensor] = {}
    prefix = f"{role}_" if role else ""
    for name, value in zip(head._fields, head, strict=True):
        if name in _LISTS:
            found |= {f"{prefix}{name}[{i}]": each for i, each in enumerate(value)}
        elif (
            name not in _OPTIONS
            and value is not None
            and not isinstance(value, (str, bool, int, float))
        ):
            found[f"{prefix}{name}"] = value
    return found


def kinds_of(role: str, head: type[Any]) -> dict[str, Any]:
    return {f"{role}_{name}": kind for name, kind in head.__annotations__.items()}


_OPS: dict[tuple[type, type], StreamedOp] = {}


def streamed(name: str, student_kind: type[Any], teacher_kind: type[Any]) -> None:
    """Defines the op `name` of a student with Head's methods and a teacher (teachers.py).

    Args:
        student_kind, teacher_kind: NamedTuples whose fields become inputs of the op. All tensors of
            the student's may be trained; its `gradient` finds their gradients.
    """
    of_student = kinds_of("student", student_kind)
    of_heads = of_student | kinds_of("teacher", teacher_kind)
    kinds = of_heads | Rows.__annotations__ | {"numbers": Tensor, "names": str}
    kinds |= Launch.__annotations__ | {"by_products": bool}

    def columns(inputs: Any, name: str) -> int | None:
        if name != "by_products":
            return None
        teacher = teacher_kind(*inputs[len(of_student) : len(of_heads)])
        return len(BY_PRODUCTS[teacher.row_kernel]) if inputs.by_products else 0

    def run(inputs, needs):
        student = student_kind(*inputs[: len(of_student)])
        teacher = teacher_kind(*inputs[len(of_student) : len(of_heads)])
        rows = Rows(*(getattr(inputs, name) for name in Rows._fields))
        spec = KDSpec.read(inputs.names, inputs.numbers)
        check_label_values(rows.labels, rows.ignore_index, student.vocab_size)
        valid, weights = rows.valid(), rows.row_weights
        workspace_mb = inputs.workspace_mb
        check_temperatures(rows.softening, valid)
        if hasattr(teacher, "check_values"):
            teacher.check_values(spec.of_rows(rows.softening), valid, student.vocab_size)
        counted = f"the labels other than ignore_index={rows.ignore_index}"
        check_num_valid(rows.num_valid, valid, counted)
        debug_check_finite(**tensors_of("student", student), **tensors_of("teacher", teacher))
        wanted = {name for name in student._fields if vars(needs).get(f"student_{name}")}
        if isinstance(student, ParallelHead):
            options = ("workspace_mb", "backend", "by_products")
            launch = {name: getattr(inputs, name) for name in options}
            parallel.agree_on(student, teacher, rows, spec, wanted, launch)
            teacher = parallel.teacher_moved(student, teacher)
        with without_autocast(weights.device.type):
            loop = dispatch.load("linear_kd_loss", inputs.backend).linear_kd_loss_fwd
            kd, ce, z_loss, found, grads = loop(
                student,
                teacher,
                rows,
                spec,
                wanted=wanted,
                workspace_bytes=None if workspace_mb is None else workspace_mb * 2**20,
                filter_eps=inputs.filter_eps,
                by_products=inputs.by_products,
            )
        if valid is not None:  # padding may hold anything, NaN included
            kd, ce, z_loss = (term.masked_fill(~valid, 0.0) for term in (kd, ce, z_loss))
            found = found.masked_fill(~valid[:, None], 0.0)
        losses = spec.of_rows(rows.softening).weighted(kd)
        for factor, term in ((spec.ce_weight, ce), (spec.z_loss_weight, z_loss)):
            if factor != 0.0:  # else the term is 0, and adding it costs two operators
                losses = losses + factor * term
        losses = torch.where(weights != 0, weights * losses, 0.0)
        return (
            losses,
            (kd, ce, z_loss, found),
            {f"student_{name}": grad for name, grad in grads.items()},
        )

    _OPS[student_kind, teacher_kind] = StreamedOp(
        name,
        inputs_of(kinds),
        run=run,
        gradients=tuple(n for n, kind in of_student.items() if kind in (Tensor, Tensor | None)),
        terms=("kd", "ce", "z_loss", "by_products"),
        columns=columns,
        keeps=lambda inputs: [
            QuantizedWeight.named(name)
            for field in ("student_quantized", "teacher_quantized", "teacher_layout")
            for name in quantized_in(getattr(inputs, field, ""))
        ],
        saved_dtype=lambda inputs, field: saved_dtype(
            getattr(inputs, field), inputs.student_hidden, inputs.row_weights
        ),
    )


def taught_by(name: str, teacher_kind: type[Any]) -> None:
    """Defines the ops of every kind of student with teachers of this kind."""
    for suffix, student_kind in STUDENT_KINDS.items():
        streamed(f"{name}{suffix}", student_kind, teacher_kind)


# suffix of an op's name -> kind
STUDENT_KINDS: dict[str, type[Any]] = {"": Head, "_in_tiles": ComposedHead}

taught_by("linear_kd_loss", Head)
taught_by("linear_kd_loss_of_tiles", ComposedHead)
taught_by("linear_kd_loss_of_values", Values)
taught_by("linear_kd_loss_of_mixture", Mixture)
taught_by("linear_topk_kd_loss", TeacherTopK)
taught_by("linear_cross_entropy", NoTeacher)
for suffix, kind in (
    ("", Head),
    ("_of_tiles", ComposedHead),
    ("_of_values", Values),
    ("_of_ranks", ParallelHead),
    ("_of_mixture", Mixture),
):
    streamed(f"linear_kd_loss{suffix}_in_ranks", ParallelHead, kind)
streamed("linear_topk_kd_loss_in_ranks", ParallelHead, TeacherTopK)
streamed("linear_cross_entropy_in_ranks", ParallelHead, NoTeacher)
