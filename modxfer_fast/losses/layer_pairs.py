"""Which layer of the student learns from which layer of the teacher.

Numbers count as in `output_hidden_states`: 0 is what enters the first block, i is what leaves block
i, also for the last block, whose state is taken before a final norm.
"""

from collections.abc import Mapping


def resolve_layers(
    layers: Mapping[int, int],
    num_student_layers: int | None = None,
    num_teacher_layers: int | None = None,
    *,
    first: int = 0,
    where: str = "layers",
) -> tuple[tuple[int, int], ...]:
    """Pairs (student, teacher) in the order of the student's layers, negative numbers resolved.

    Args:
        layers: {student layer: teacher layer}; -1 is the last block.
        num_student_layers, num_teacher_layers: blocks of each model; None accepts any layer that
            is not negative.
        first: the lowest layer that exists, 0 or 1.
        where: name of the argument, for messages.

    Raises:
        TypeError, ValueError: no pair, a layer that does not exist, or one named twice.
    """
    if not isinstance(layers, Mapping) or not layers:
        raise ValueError(
            f"{where}: expected a mapping of student layers to teacher layers, got {layers!r}"
        )
    pairs = []
    for student, teacher in layers.items():
        pairs.append(
            (
                _resolve(student, num_student_layers, first, f"{where}: student layer"),
                _resolve(teacher, num_teacher_layers, first, f"{where}: teacher layer"),
            )
        )
    students = [student for student, _ in pairs]
    if len(set(students)) != len(students):
        raise ValueError(f"{where}: expected each student layer once, got {dict(layers)}")
    return tuple(sorted(pairs))


def resolve_weights(
    weight: float | Mapping[int, float],
    layers: Mapping[int, int],
    pairs: tuple[tuple[int, int], ...],
    num_student_layers: int | None,
    where: str = "weight",
) -> tuple[float, ...]:
    """One positive weight a pair, in their order.

    Args:
        weight: one number for all, or {student layer: number}, named as in `layers`.
    """
    if isinstance(weight, Mapping):
        if set(weight) != set(layers):
            raise ValueError(
                f"{where}: expected one number for each student layer "
                f"{', '.join(map(str, layers))}, got {dict(weight)}"
            )
        by_layer = {
            _resolve(layer, num_student_layers, 0, where): value for layer, value in weight.items()
        }
        weights = tuple(float(by_layer[student]) for student, _ in pairs)
    else:
        weights = (float(weight),) * len(pairs)
    if not all(0 < value < float("inf") for value in weights):
        raise ValueError(f"{where}: expected positive numbers, got {weight}")
    return weights


def _resolve(layer: int, count: int | None, first: int, where: str) -> int:
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise TypeError(f"{where}: expected an int, got {layer!r}")
    if count is None:
        if layer < first:
            raise ValueError(
                f"{where}: expected {first} or more, got {layer}; a negative layer needs the "
                "number of layers"
            )
        return layer
    resolved = layer + count + 1 if layer < 0 else layer
    if not first <= resolved <= count:
        existing = ", ".join(map(str, range(first, count + 1)))
        raise ValueError(f"{where}: expected one of {existing}, or counted from -1, got {layer}")
    return resolved


def pair_name(pair: tuple[int, int]) -> str:
    """As in the names of parameters and logs: student_teacher."""
    return f"{pair[0]}_{pair[1]}"
