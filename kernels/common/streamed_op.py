"""Torch ops made from one description: schema, implementation, fake and autograd, by field name.

A NamedTuple of tensors and options is the op's input; its annotations become the schema, and every
function below receives it whole. `define_op` makes any such op; `StreamedOp` makes the two of a
loss whose gradient is computed beside it:

    <name>_fwd     a scalar; its forward leaves the gradients, which the backward scales; or, of
                   inputs whose field `gradients` is "recompute", its backward runs it again
    <name>_rows    a loss a row; each brings a gradient of its own, so its backward runs `_fwd`
                   again with weights that hold it
"""

from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from modxfer_fast.kernels.common.backward import refuse_double_backward, scaled
from modxfer_fast.kernels.common.scalars import READS_NUMBERS

_SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    str: "str",
    str | None: "str?",
    bool: "bool",
    list[Tensor]: "Tensor[]",
    list[Tensor | None]: "Tensor?[]",
    list[bool]: "bool[]",
    list[float]: "float[]",
    list[int]: "int[]",
    int: "int",
    int | None: "int?",
    float: "float",
    float | None: "float?",
    int | torch.SymInt | None: "SymInt?",  # a count that differs from batch to batch
}
# of inputs, by name; what is left out is None
Gradients = dict[str, Tensor | None]
Inputs = TypeVar("Inputs", bound=tuple[Any, ...])  # a NamedTuple


def wants_gradient(tensor: Tensor | None) -> bool:
    return torch.is_grad_enabled() and tensor is not None and tensor.requires_grad


def inputs_of(kinds: Mapping[str, Any]) -> Any:
    """A NamedTuple class for `define_op` whose fields are put together."""
    return NamedTuple("Inputs", list(kinds.items()))


def define_op(
    name: str,
    inputs: type[Inputs],
    outputs: Iterable[str],
    *,
    run: Callable[[Inputs], Tensor | tuple[Tensor, ...]],
    fake: Callable[[Inputs], Tensor | tuple[Tensor, ...]],
    save: Callable[[Any, Inputs, Any], None] | None = None,
    backward: Callable[..., Gradients] | None = None,
) -> torch._ops.OpOverload:
    """Defines `modxfer::<name>` and returns it; to be called with the fields in their order.

    Args:
        inputs: NamedTuple, whose annotations are among those of `_SCHEMA`. A field `numbers` keeps
            the op out of CUDA graphs.
        outputs: names of the tensors it returns; of a list of them, `name[]`.
        run, fake: from the inputs to what is returned, one tensor or a tuple; `fake` sees no data.
        save: called with (ctx, inputs, what was returned) where a gradient is wanted. An output
            without a gradient is marked here.
        backward: from (ctx, a gradient or None for each output) to the gradients of inputs.
    """
    kinds: dict[str, Any] = inputs.__annotations__
    read: Callable[..., Inputs] = inputs
    arguments = ", ".join(f"{_SCHEMA[kind]} {field}" for field, kind in kinds.items())
    results = ", ".join(map(_result, outputs))
    qualified = f"modxfer::{name}"
    torch.library.define(
        qualified, f"({arguments}) -> ({results})", tags=READS_NUMBERS if "numbers" in kinds else ()
    )
    torch.library.impl(qualified, "CompositeExplicitAutograd", lambda *args: run(read(*args)))
    torch.library.register_fake(qualified, lambda *args: fake(read(*args)))
    if save is not None and backward is not None:
        loss = name.rpartition("_")[0]  # what a user called

        def setup_context(ctx, inputs, output):
            # torch wants a gradient for each tensor of a list, and of an empty one an empty list
            ctx.absent = {
                field: [None] * len(value)
                for field, value in zip(kinds, inputs, strict=True)
                if isinstance(value, list) and all(isinstance(each, Tensor) for each in value)
            }
            save(ctx, read(*inputs), output)

        def by_position(ctx, *grads):
            refuse_double_backward(loss)
            found = backward(ctx, *grads)
            return tuple([found.get(field, ctx.absent.get(field)) for field in kinds])

        torch.library.register_autograd(qualified, by_position, setup_context=setup_context)
    return getattr(torch.ops.modxfer, name).default


def _result(name: str) -> str:
    bare = name.removesuffix("[]")
    return f"Tensor{name[len(bare) :]} {bare}"


def save_values(ctx, *values: Any) -> None:
    """Keeps tensors and constants for the backward, where `saved_values` has them."""
    lists = [value for value in values if _is_tensors(value)]
    ctx.save_for_backward(
        *[value if isinstance(value, Tensor) else None for value in values],
        *[tensor for tensors in lists for tensor in tensors],
    )
    ctx.constants = [
        _Count(len(value)) if _is_tensors(value) else None if isinstance(value, Tensor) else value
        for value in values
    ]


def saved_values(ctx) -> list[Any]:
    count = len(ctx.constants)
    saved, rest = ctx.saved_tensors[:count], list(ctx.saved_tensors[count:])
    values: list[Any] = []
    for tensor, constant in zip(saved, ctx.constants, strict=True):
        if isinstance(constant, _Count):
            values.append(rest[: constant.tensors])
            del rest[: constant.tensors]
        else:
            values.append(constant if tensor is None else tensor)
    return values


class _Count(NamedTuple):
    """Stands for a list of so many saved tensors."""

    tensors: int


def _is_tensors(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Tensor)


class StreamedOp(Generic[Inputs]):
    """The loss `name`, a sum of weighted rows whose gradient is computed beside it, as two ops.

    Args:
        inputs: as of `define_op`. One field is `row_weights` [N], the factor of each row; where it
            is 0 the row does not count, whatever comes out of it.
        run: from (inputs, needs) to (rows, terms, gradients): rows [N], weighted; a tuple of
            further tensors [N] without a gradient; and those gradients of the sum of rows whose
            names are True in needs.
        gradients: names of the inputs that are differentiated.
        terms: names of the further tensors.
        keeps: from inputs to what has to live until the backward of `_rows`, which runs again.
        columns: from (inputs, name of a term) to k where that is [N, k]; None for [N].
        saved_dtype: from (inputs, name) to the dtype in which that gradient waits for the upstream
            one; without it, the input's.
    """

    def __init__(
        self,
        name: str,
        inputs: type[Inputs],
        *,
        run: Callable[[Inputs, Any], tuple[Tensor, tuple[Tensor, ...], Gradients]],
        gradients: tuple[str, ...],
        terms: tuple[str, ...] = (),
        keeps: Callable[[Inputs], Any] | None = None,
        columns: Callable[[Inputs, str], int | None] = lambda inputs, name: None,
        saved_dtype: Callable[[Inputs, str], torch.dtype] | None = None,
    ):
        self.inputs: Callable[..., Inputs] = inputs
        self._run, self._gradients, self._terms = run, gradients, terms
        self._num_results, self._columns = 1 + len(terms), columns
        self._keeps = keeps
        self._saved_dtype = saved_dtype or (lambda values, name: getattr(values, name).dtype)
        self._fwd = define_op(
            f"{name}_fwd",
            inputs_of({**inputs.__annotations__, "needs": list[bool]}),
            ("loss", *terms, *(f"d{gradient}" for gradient in gradients)),
            run=self._run_fwd,
            fake=self._fake_fwd,
            save=self._save_fwd,
            backward=self._backward_fwd,
        )
        self._rows = define_op(
            f"{name}_rows",
            inputs,
            ("rows", *terms),
            run=self._run_rows,
            fake=self._fake_rows,
            save=self._save_rows,
            backward=self._backward_rows,
        )

    def __call__(self, inputs: Inputs, reduction: str) -> tuple[Tensor, ...]:
        """(loss, *terms): of each row for reduction "none", else their sum; terms are of rows."""
        if reduction == "none":
            return _as_tuple(self._rows(*inputs))
        needs = [wants_gradient(getattr(inputs, name)) for name in self._gradients]
        return self._fwd(*inputs, needs)[: self._num_results]

    def _run_fwd(self, inputs):
        needs = SimpleNamespace(**dict(zip(self._gradients, self._made(inputs), strict=True)))
        rows, terms, found = self._run(self.inputs(*inputs[:-1]), needs)
        absent = inputs.row_weights.new_empty
        grads = [found.get(name) for name in self._gradients]
        return rows.sum(), *terms, *[absent(0) if grad is None else grad for grad in grads]

    def _made(self, inputs):
        """Which gradients `_fwd` leaves."""
        return [need and not _recomputes(inputs) for need in inputs.needs]

    def _run_rows(self, inputs):
        needs = SimpleNamespace(**dict.fromkeys(self._gradients, False))
        rows, terms, _ = self._run(inputs, needs)
        return (rows, *terms) if terms else rows

    def _fake_fwd(self, inputs):
        weights = inputs.row_weights
        pairs = zip(self._gradients, self._made(inputs), strict=True)
        grads = [
            self._fake_gradient(inputs, name) if need else weights.new_empty(0)
            for name, need in pairs
        ]
        return weights.new_empty(()), *self._fake_terms(inputs), *grads

    def _fake_terms(self, inputs):
        widths = [self._columns(inputs, name) for name in self._terms]
        n, empty = inputs.row_weights.shape[0], inputs.row_weights.new_empty
        return [empty(n) if width is None else empty(n, width) for width in widths]

    def _fake_gradient(self, inputs, name):
        tensor = getattr(inputs, name)
        return tensor.new_empty(tensor.shape, dtype=self._saved_dtype(inputs, name))

    def _fake_rows(self, inputs):
        rows, terms = torch.empty_like(inputs.row_weights), self._fake_terms(inputs)
        return (rows, *terms) if terms else rows

    def _save_fwd(self, ctx, inputs, outputs):
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        ctx.recomputes = _recomputes(inputs)
        if ctx.recomputes:
            self._save_inputs(ctx, inputs)
            return
        grads = zip(self._gradients, outputs[self._num_results :], strict=True)
        kept = [pair for pair, need in zip(grads, inputs.needs, strict=True) if need]
        ctx.dtypes = {name: getattr(inputs, name).dtype for name, _ in kept}
        ctx.save_for_backward(*[grad for _, grad in kept])

    def _backward_fwd(self, ctx, dloss, *_):
        if dloss is None:
            return {}
        if ctx.recomputes:
            *values, needs = saved_values(ctx)
            inputs = self.inputs(*values)
            return {
                name: scaled(grad, dloss).to(getattr(inputs, name).dtype)
                for name, grad in self._recomputed(inputs, needs).items()
            }
        saved = zip(ctx.dtypes.items(), ctx.saved_tensors, strict=True)
        return {name: scaled(grad, dloss).to(dtype) for (name, dtype), grad in saved}

    def _save_rows(self, ctx, inputs, outputs):
        self._save_inputs(ctx, inputs)
        ctx.mark_non_differentiable(*_as_tuple(outputs)[1:])
        ctx.set_materialize_grads(False)

    def _save_inputs(self, ctx, inputs):
        ctx.kept = None if self._keeps is None else self._keeps(inputs)
        save_values(ctx, *inputs)

    def _backward_rows(self, ctx, drows, *_):
        if drows is None:
            return {}
        inputs = self.inputs(*saved_values(ctx))
        weights = inputs.row_weights
        # a row without weight may bring any upstream gradient, inf * 0 included
        inputs = inputs._replace(row_weights=torch.where(weights != 0, weights * drows, 0.0))
        wanted = self.inputs(*ctx.needs_input_grad)
        needs = [getattr(wanted, name) for name in self._gradients]
        return {
            name: grad.to(getattr(inputs, name).dtype)
            for name, grad in self._recomputed(inputs, needs).items()
        }

    def _recomputed(self, inputs, needs):
        """The needed gradients of the sum of rows, by name, as `_fwd` leaves them."""
        if _recomputes(inputs):
            inputs = inputs._replace(gradients="forward")
        grads = self._fwd(*inputs, needs)[self._num_results :]
        named = zip(self._gradients, grads, needs, strict=True)
        return {name: grad for name, grad, need in named if need}


def _recomputes(inputs: Any) -> bool:
    return getattr(inputs, "gradients", "forward") == "recompute"


def _as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs
