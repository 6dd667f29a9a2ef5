"""Vocabulary-parallel heads on 2 and 4 ranks equal the whole head in fp64.

The ranks run all cases of a world size in one launch and answer with an error a case.
"""

import dataclasses
import itertools
import random
import traceback

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from modxfer_fast import (
    LoraWeight,
    QuantizedWeight,
    TeacherLogits,
    TeacherLogProbs,
    TeacherMixture,
    TeacherProbs,
    VocabParallelWeight,
    linear_cross_entropy,
    linear_kd_loss,
    linear_kd_loss_terms,
    linear_log_probs_terms,
)
from modxfer_fast.kernels import dispatch
from modxfer_fast.kernels.divergences import DIVERGENCES
from modxfer_fast.testing.accuracy import assert_within_budget
from tests.inputs import NATIVE
from tests.pairs import pairwise

D_S, D_T = 8, 12
SIZES = {
    # of the student, of a teacher that is divided in another way
    2: {"equal": ([18, 18], [18, 18]), "unequal": ([23, 13], [10, 26])},
    4: {"equal": ([9, 9, 9, 9], [9, 9, 9, 9]), "unequal": ([16, 1, 3, 16], [2, 20, 13, 1])},
}
TEACHERS = ("whole", "same", "other", "logits", "log_probs", "probs", "lora", "quantized")
WEIGHTS = (0.7, 0.25, 2.0)  # of a sum of three
BENDS = {"student_softcap": 6.0, "teacher_softcap": 9.0, "student_logit_scale": 1.5}


@dataclasses.dataclass(frozen=True)
class Case:
    divergence: str = "forward_kl"
    backend: str = "cpp"
    dtype: str = "float32"
    sizes: str = "equal"
    teacher: str = "whole"
    temperature: float | str = 1.0  # "tokens": of each its own
    reduction: str = "mean"
    labels: str = "some"
    weighted: bool = False
    bias: bool = True
    lora: bool = False
    bends: bool = False
    hard: bool = False  # label smoothing and z-loss
    frozen: str = ""
    large: bool = False  # several chunks
    excluded: bool = False  # the first rank's classes have no probability, nor has the last one

    @property
    def weights(self) -> dict[str, float]:
        """By divergence, of "a+b" some."""
        names = self.divergence.split("+")
        return dict(zip(names, WEIGHTS if len(names) > 1 else [1.0], strict=True))

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in dataclasses.astuple(self))


def _product(**options: list) -> list[dict]:
    values = itertools.product(*options.values())
    return [dict(zip(options, each, strict=True)) for each in values]


def _pairs(product: list[dict]) -> list[Case]:
    """Those in which any two values of the options meet."""
    return [Case(**product[i]) for i in pairwise(product)]


def _cases() -> list[Case]:
    losses = {
        "divergence": [*DIVERGENCES, "forward_kl+jsd+total_variation"],
        "sizes": ["equal", "unequal"],
        "temperature": [1.0, 2.0, "tokens"],
        "labels": ["some", "none", "all_ignored"],
        "excluded": [False, True],
        "bends": [False, True],
        "hard": [False, True],
    }
    heads = {
        "divergence": ["forward_kl", "jsd"],
        "backend": NATIVE,
        "sizes": ["equal", "unequal"],
        "teacher": list(TEACHERS),
        "reduction": ["mean", "sum", "none"],
        "weighted": [False, True],
        "bias": [False, True],
        "lora": [False, True],
        "frozen": ["", "weight", "hidden", "all"],
        "large": [False, True],
    }
    cases = _pairs(_product(**losses, backend=NATIVE, dtype=["float32", "bfloat16"]))
    cases += _pairs(random.Random(0).sample(_product(**heads), 2000))
    cases += [Case(each, "reference", "float64", "unequal") for each in DIVERGENCES]
    available, _ = dispatch.availability("kd_loss", "triton")
    if available:  # one of each kind; its kernels are compared in test_kd_loss_stages.py
        cases += [
            Case("forward_kl", "triton", sizes="unequal", temperature=2.0, excluded=True),
            Case("jsd", "triton", sizes="unequal", hard=True, bends=True),
            Case("negative_log_acceptance", "triton", sizes="unequal", temperature="tokens"),
            Case("logits_mse", "triton", sizes="unequal", excluded=True),
            Case("logits_cosine", "triton", sizes="unequal", temperature=2.0, hard=True),
        ]
    return list(dict.fromkeys(cases))


CASES = _cases()


def randn(*size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


class Whole:
    """The tensors of a case, the same on every rank, and its definition written out densely."""

    def __init__(self, case: Case, classes: int):
        self.case, self.classes, self.given = case, classes, None
        self.rows = n = 80 if case.large else 13
        dtype = getattr(torch, case.dtype)
        self.hidden = randn(n, D_S, seed=1).to(dtype)
        self.teacher_hidden = randn(n, D_T, seed=4).to(dtype)
        self.trained = {"weight": (0.8 * randn(classes, D_S, seed=2)).to(dtype)}
        self.teacher_weight = (0.6 * randn(classes, D_T, seed=5)).to(dtype)
        self.teacher_bias = (0.5 * randn(classes, seed=6)).to(dtype)
        if case.bias:
            self.trained["bias"] = (0.5 * randn(classes, seed=3)).to(dtype)
        first = 0
        if case.excluded:
            first = SIZES[dist.get_world_size()][case.sizes][0][0]
            bias = self.trained.setdefault("bias", torch.zeros(classes, dtype=dtype))
            self.teacher_bias[:first] = self.teacher_bias[-1] = bias[-1] = -torch.inf
            if case.divergence not in ("forward_kl", "jsd"):  # else one side alone is finite
                bias[:first] = -torch.inf
        if case.lora:
            self.trained["lora_A"] = (0.4 * randn(3, D_S, seed=7)).to(dtype)
            self.trained["lora_B"] = (0.4 * randn(classes, 3, seed=8)).to(dtype)
        self.labels = None
        if case.labels != "none":
            self.labels = first + (torch.arange(n) * 5) % (classes - 1 - first)
            self.labels[3::4] = -100
            if case.labels == "all_ignored":
                self.labels[:] = -100
        self.token_weights = 0.5 + torch.rand(n, generator=torch.Generator().manual_seed(9))
        self.upstream = randn(n, seed=10)
        is_number = case.temperature != "tokens"
        self.temperature = case.temperature if is_number else torch.linspace(0.6, 3.0, n)

    @property
    def options(self) -> dict:
        case = self.case
        options = {"temperature": self.temperature, "kd_weight": 0.7}
        for name, value in (("alpha", 0.4), ("beta", 0.3)):
            if any(getattr(DIVERGENCES[each], name) is not None for each in case.weights):
                options[name] = value
        if case.labels != "none":
            options["ce_weight"] = 0.4
        if case.bends:
            options |= BENDS
        if case.hard:
            options["z_loss_weight"] = 0.01
            # of an excluded class the smoothed loss is infinite, whose gradient has no value
            smooths = case.labels != "none" and not case.excluded
            options["label_smoothing"] = 0.1 if smooths else 0.0
        return options

    def teacher_logits(self, dtype: torch.dtype) -> Tensor:
        if self.given is not None:
            return self.given.to(dtype)
        z = self.teacher_hidden.to(dtype) @ self.teacher_weight.to(dtype).T
        return z + self.teacher_bias.to(dtype)

    def teacher(self, sizes: list[int], others: list[int]) -> dict:
        """The arguments that say what the teacher is."""
        kind, hidden, weight = self.case.teacher, self.teacher_hidden, self.teacher_weight
        z = self.teacher_logits(torch.float64)
        if kind in ("logits", "log_probs", "probs"):
            make = {"logits": TeacherLogits, "log_probs": TeacherLogProbs, "probs": TeacherProbs}
            values = {"logits": z, "log_probs": z.log_softmax(-1), "probs": z.softmax(-1)}[kind]
            values = values.to(hidden.dtype)
            self.given = values.double().log() if kind == "probs" else values.double()
            return {"teacher_hidden": make[kind](values)}
        bias = self.teacher_bias
        if kind in ("same", "other"):
            divided = sizes if kind == "same" else others
            here = span_of(divided)
            weight, bias = VocabParallelWeight(weight[here].clone(), None, divided), bias[here]
        if kind == "lora":
            a, b = randn(2, D_T, seed=11).to(hidden.dtype), 0.3 * randn(self.classes, 2, seed=12)
            weight = LoraWeight(weight, a, b.to(hidden.dtype), 0.5)
            self.teacher_weight = weight.weight.double() + 0.5 * weight.lora_B.double() @ a.double()
        if kind == "quantized":
            stored = (weight.float() * 40).round().to(torch.int8)
            weight = QuantizedWeight(stored, lambda rows: rows.float() / 64)
            self.quantized = weight
            self.teacher_weight = stored.double() / 64
        return {"teacher_hidden": hidden, "teacher_weight": weight, "teacher_bias": bias}

    def definition(self, leaves: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """loss, kd, ce of leaves in their dtype; `hidden` is one of them."""
        case, options = self.case, self.options
        dtype = leaves["hidden"].dtype
        weight = leaves["weight"]
        if case.lora:
            weight = weight + 1.5 * leaves["lora_B"] @ leaves["lora_A"]
        z_s = leaves["hidden"] @ weight.T
        if "bias" in leaves:
            z_s = z_s + leaves["bias"]
        z_t = self.teacher_logits(dtype)
        if case.bends:
            z_s = _capped(1.5 * z_s, 6.0)
            z_t = _capped(z_t, 9.0)
        # an excluded class keeps a probability too small to count, for autograd
        floor = -600.0 if dtype == torch.float64 else -80.0
        divisor = self.temperature
        if isinstance(divisor, Tensor):
            divisor = divisor.to(dtype)[:, None]
        if DIVERGENCES[case.divergence.split("+")[0]].row_sums == "of_logits":
            # all classes count, those that both sides exclude as equal
            log_q, log_p = (z.masked_fill(z == -torch.inf, 0.0) / divisor for z in (z_s, z_t))
        else:
            log_q, log_p = ((z / divisor).log_softmax(-1).clamp(min=floor) for z in (z_s, z_t))
        kd = 0.0
        for name, weight in case.weights.items():
            of_one = DIVERGENCES[name].definition(
                log_p, log_q, options.get("alpha", 0.0), options.get("beta", 0.5)
            )
            kd = kd + weight * of_one
        counts = (
            torch.ones(self.rows, dtype=torch.bool) if self.labels is None else self.labels != -100
        )
        ce = torch.zeros(self.rows, dtype=dtype)
        if self.labels is not None:
            ce = torch.nn.functional.cross_entropy(
                *(z_s, self.labels.clamp(min=0)),
                reduction="none",
                label_smoothing=options.get("label_smoothing", 0.0),
            )
        rows = 0.7 * kd + options.get("ce_weight", 0.0) * ce
        rows = rows + options.get("z_loss_weight", 0.0) * z_s.logsumexp(-1).square()
        if case.weighted:
            rows = rows * self.token_weights.to(dtype)
        rows = torch.where(counts, rows, 0.0)
        count = max(int(counts.sum()), 1)
        parts = [torch.where(counts, term, 0.0).sum() / count for term in (kd, ce)]
        if case.reduction == "none":
            return (rows * self.upstream.to(dtype)).sum(), *parts
        return rows.sum() / (count if case.reduction == "mean" else 1), *parts


def _capped(z: Tensor, cap: float) -> Tensor:
    return torch.where(z.isinf(), z, cap * torch.tanh(z / cap))


def span_of(sizes: list[int]) -> slice:
    rank = dist.get_rank()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def run_case(case: Case) -> tuple:
    """Raises AssertionError on a rank where it differs from the dense loss.

    Returns what every rank has to the bit.
    """
    sizes, others = SIZES[dist.get_world_size()][case.sizes]
    if case.large:
        sizes, others = ([100 * size for size in each] for each in (sizes, others))
    whole = Whole(case, sum(sizes))
    here = span_of(sizes)
    frozen = {"weight": ["weight", "lora_A"], "hidden": ["hidden"], "": []}.get(case.frozen)
    leaves = {"hidden": whole.hidden.clone()}
    for name, value in whole.trained.items():
        leaves[name] = (value if name == "lora_A" else value[here]).clone()
    for name, leaf in leaves.items():
        leaf.requires_grad_(frozen is not None and name not in frozen)
    weight = leaves["weight"]
    if case.lora:
        weight = LoraWeight(weight, leaves["lora_A"], leaves["lora_B"], 1.5)
    explicit = None if case.sizes == "equal" else sizes
    terms = linear_kd_loss_terms(
        *(leaves["hidden"], VocabParallelWeight(weight, None, explicit)),
        **whole.teacher(sizes, others),
        student_bias=leaves.get("bias"),
        labels=whole.labels,
        token_weights=whole.token_weights if case.weighted else None,
        divergence=case.weights if len(case.weights) > 1 else case.divergence,
        reduction=case.reduction,
        backend=case.backend,
        workspace_mb=1,
        **whole.options,
    )
    loss = terms.loss
    if case.reduction == "none":
        loss = (loss * whole.upstream.to(loss)).sum()
    got = {"loss": loss.detach(), "kd": terms.kd, "ce": terms.ce}
    trained = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    if trained:
        grads = torch.autograd.grad(loss, list(trained.values()))
        got |= dict(zip(trained, grads, strict=True))
    runs = []
    for dtype in (torch.float64, torch.float32):
        wide = {"hidden": whole.hidden, **whole.trained}
        wide = {k: t.detach().to(dtype).requires_grad_() for k, t in wide.items()}
        value, kd, ce = whole.definition(wide)
        grads = dict(zip(wide, torch.autograd.grad(value, list(wide.values())), strict=True))
        for name in wide:
            if name not in ("hidden", "lora_A"):
                grads[name] = grads[name][here]
        runs.append({"loss": value.detach(), "kd": kd.detach(), "ce": ce.detach(), **grads})
    exact, plain = runs
    for name, result in got.items():
        scale = 4 * exact[name].abs().max().item() + (10.0 if name in ("loss", "kd", "ce") else 0.5)
        wide_dtype = torch.promote_types(result.dtype, torch.float32)
        scale *= torch.finfo(wide_dtype).eps / torch.finfo(result.dtype).eps
        assert_within_budget(result, exact[name], plain[name].to(result.dtype), name, scale)
    shared = [got[name] for name in ("loss", "kd", "ce", "hidden", "lora_A") if name in got]
    return tuple(float(value) for tensor in shared for value in tensor.double().flatten()[:50])


def run_cases(cases: list[Case]) -> list:
    return on_ranks(run_case, cases)


def on_ranks(function, values: list) -> list:
    """Of each value, what the function returned, or the error that it raised as text."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    answers = []
    for value in values:
        try:
            answers.append(function(value))
        except Exception:
            answers.append(traceback.format_exc(limit=-6))
    return answers


# --- two and four ranks


@pytest.fixture(scope="module", params=[2, 4])
def outcomes(request):
    ranks = request.getfixturevalue("ranks" if request.param == 2 else "four_ranks")
    results = ranks.run(run_cases, CASES, timeout=300)
    return {case: [rank[i] for rank in results] for i, case in enumerate(CASES)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_loss_is_that_of_the_whole_head(case, outcomes):
    for rank, outcome in enumerate(outcomes[case]):
        assert not isinstance(outcome, str), f"rank {rank}: {outcome}"
        assert outcome == outcomes[case][0], f"rank {rank} has other bits"


# --- what is refused

HIDDEN, WEIGHT = randn(6, 4, seed=1), randn(10, 4, seed=2)
LABELS = torch.arange(6)
# name -> (text on every rank, text on rank 1, where it is the one to blame; arguments from the rank
# and this rank's rows of the weight)
REFUSED = {
    "unequal_shards": ("VocabParallelWeight: sizes: expected the same on every rank", ""),
    "rows_unlike_sizes": ("rank 1: ValueError: student_weight: expected 5 rows", "of rank 1"),
    "dtype": ("student_hidden: expected the same on every rank", ""),
    "rows": ("student_hidden: expected the same on every rank", ""),
    "labels": ("labels: expected the same on every rank", ""),
    "labels_in_another_order": ("labels: expected the same on every rank", ""),
    "mixture_weights": ("TeacherMixture: weights: expected the same on every rank", ""),
    "mixture_route": ("TeacherMixture: route: expected the same on every rank", ""),
    "label_out_of_range": ("rank 1: ValueError: labels: expected values in", "labels: expected"),
    "bias": ("rank 1: ValueError: student_bias: expected", "student_bias: expected"),
    "temperature": ("temperature: expected the same on every rank", ""),
    "frozen": ("gradients asked for: expected the same", ""),
    "workspace": ("workspace_mb: expected the same", ""),
    "whole_student": ("beside a whole student's", ""),
    "other_group": ("beside another group's", ""),
    "sizes": ("VocabParallelWeight: sizes: expected 2, one a rank", ""),
    "empty_shard": ("VocabParallelWeight: sizes: expected a positive number", ""),
    "group": ("VocabParallelWeight: group: expected a ProcessGroup", ""),
    "common": ("vocabulary: expected at least one common class on every rank", ""),
    "values": ("rank 1: ValueError: teacher_log_probs: expected values at", "teacher_log_probs: "),
    "temperatures": ("temperature: expected the same on every rank", ""),
    "filter_eps": ("filter_eps: expected None beside a VocabParallelWeight", ""),
}


def refused(name: str) -> str:
    """The error of this rank, whose next call works."""
    try:
        _refused(name, dist.get_rank())
    except (ValueError, TypeError) as error:
        return str(error)
    return "accepted"


def _refused(name: str, rank: int) -> None:
    is_bad = rank == 1
    here = span_of([5, 5])
    hidden, shard, sizes = HIDDEN.clone(), WEIGHT[here].clone(), None
    options = {"labels": LABELS.clone(), "ce_weight": 1.0}
    teacher, group = {"teacher_hidden": HIDDEN, "teacher_weight": WEIGHT}, None
    if name == "unequal_shards":
        shard = WEIGHT[: 5 + rank]
        teacher["teacher_weight"] = VocabParallelWeight(shard.clone())
    if name == "rows_unlike_sizes":
        shard, sizes = WEIGHT[: 5 + rank], [5, 5]
    if name == "dtype" and is_bad:
        hidden, shard = hidden.bfloat16(), shard.bfloat16()
    if name == "rows" and is_bad:
        hidden = HIDDEN[:5]
        teacher["teacher_hidden"], options["labels"] = HIDDEN[:5], LABELS[:5]
    if name == "labels" and is_bad:
        options["labels"][0] = 7
    if name == "labels_in_another_order" and is_bad:
        options["labels"] = LABELS.flip(0)
    if name.startswith("mixture"):
        teachers = [TeacherLogits(HIDDEN @ WEIGHT.T), TeacherLogits(HIDDEN @ WEIGHT.flip(0).T)]
        given = {"weights": torch.tensor([[0.5, 0.5]] * 6)}
        given = given if name == "mixture_weights" else {"route": torch.arange(6) % 2}
        values = next(iter(given.values()))
        if is_bad:
            values[[0, 1]] = 1 - values[[1, 0]] if name == "mixture_weights" else values[[1, 0]]
            values[0] += name == "mixture_weights"
        teacher = {"teacher_hidden": TeacherMixture(teachers, **given)}
    if name == "label_out_of_range" and is_bad:
        options["labels"][0] = 10
    if name == "bias" and is_bad:
        options["student_bias"] = torch.zeros(4)
    if name == "temperature" and is_bad:
        options["temperature"] = 2.0
    if name == "frozen":
        shard.requires_grad_(not is_bad)
    if name == "workspace":
        options["workspace_mb"] = 64 + rank
    if name in ("whole_student", "other_group"):
        divided = VocabParallelWeight(WEIGHT[here])
        if name == "other_group":
            divided = VocabParallelWeight(WEIGHT, dist.new_subgroups(1)[0])
        teacher["teacher_weight"] = divided
    if name == "sizes":
        sizes = [10]
    if name == "empty_shard":
        sizes = [10, 0]
    if name == "group":
        group = "tp"
    if name == "common":
        teacher["teacher_weight"], options["vocabulary"] = WEIGHT[:5], "common"
    if name == "values":
        values = torch.full((6, 10), -2.0)
        values[2, 7] = 1.0  # of a class of rank 1's
        teacher = {"teacher_hidden": TeacherLogProbs(values)}
    if name == "temperatures":
        options["temperature"] = torch.full((6,), 2.0 + rank)
    if name == "filter_eps":
        options["filter_eps"] = 1e-3
    weight = VocabParallelWeight(shard, group, sizes)
    if name == "whole_student":
        weight = WEIGHT
    linear_kd_loss(hidden, weight, **teacher, **options)


def run_refused(names: list[str]) -> list:
    return on_ranks(refused, names)


@pytest.fixture(scope="module")
def refusals(ranks):
    names = list(REFUSED)
    results = ranks.run(run_refused, names, timeout=300)
    return {name: [rank[i] for rank in results] for i, name in enumerate(names)}


@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_says_what_is_wrong_on_one_of_them(name, refusals):
    on_all, on_one = REFUSED[name]
    assert on_all in refusals[name][0]
    assert (on_one or on_all) in refusals[name][1]


def test_without_a_process_group():
    with pytest.raises(ValueError, match=r"group: expected torch\.distributed with"):
        VocabParallelWeight(WEIGHT)


# --- a group of one rank, and compiled graphs


def run_others(names: list[str]) -> list:
    return on_ranks(lambda name: globals()[name](), names)


def group_of_one() -> tuple:
    """A head that one rank has whole is a whole head, to the bit."""
    group, _ = dist.new_subgroups(1)
    results = []
    for weight in (WEIGHT.clone(), WEIGHT.clone()):
        leaves = [HIDDEN.clone().requires_grad_(), weight.requires_grad_()]
        given = VocabParallelWeight(weight, group) if results else weight
        loss = linear_kd_loss(
            *(leaves[0], given, HIDDEN, WEIGHT.flip(0)),
            labels=LABELS,
            ce_weight=0.5,
            divergence="jsd",
        )
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    return ()


def compiled() -> tuple:
    """One graph, whose op names the group; the gradients of eager mode."""
    here = span_of([5, 5])
    results = []

    def loss_of(hidden, shard):
        return linear_kd_loss(
            *(hidden, VocabParallelWeight(shard), HIDDEN, WEIGHT.flip(0)),
            labels=LABELS,
            ce_weight=0.5,
            divergence="jsd",
        )

    for function in (loss_of, torch.compile(loss_of, backend="aot_eager", fullgraph=True)):
        leaves = [HIDDEN.clone().requires_grad_(), WEIGHT[here].clone().requires_grad_()]
        loss = function(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    return ()


def by_products() -> tuple:
    """Of every token those of the whole head."""
    here = span_of([5, 5])
    for divergence in ("forward_kl", "logits_cosine"):
        whole, divided = (
            linear_kd_loss_terms(
                *(HIDDEN, weight, HIDDEN, WEIGHT.flip(0)),
                labels=LABELS,
                divergence=divergence,
                ce_weight=0.5,
                temperature=2.0,
                by_products=True,
            ).by_products
            for weight in (WEIGHT, VocabParallelWeight(WEIGHT[here]))
        )
        for one, other in zip(whole, divided, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    return ()


def cross_entropy() -> tuple:
    """Without a teacher, and the log-probabilities of tokens with what comes beside them."""
    here, results = span_of([5, 5]), []
    for is_whole in (True, False):
        shard = (WEIGHT if is_whole else WEIGHT[here]).clone().requires_grad_()
        hidden = HIDDEN.clone().requires_grad_()
        weight = shard if is_whole else VocabParallelWeight(shard)
        loss = linear_cross_entropy(hidden, weight, LABELS, label_smoothing=0.1, softcap=5.0)
        dhidden, dweight = torch.autograd.grad(loss, (hidden, shard))
        terms = linear_log_probs_terms(hidden.detach(), weight, LABELS)
        results.append((loss, dhidden, dweight[here] if is_whole else dweight, *terms))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    return ()


OTHERS = ["cross_entropy", "group_of_one", "compiled", "by_products"]


@pytest.fixture(scope="module")
def others(ranks):
    return list(zip(*ranks.run(run_others, OTHERS, timeout=300), strict=True))


@pytest.mark.parametrize("name", OTHERS)
def test_others(name, others):
    for rank, outcome in enumerate(others[OTHERS.index(name)]):
        assert outcome == (), f"rank {rank}: {outcome}"
