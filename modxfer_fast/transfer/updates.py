"""How large a moved LoRA's updates are, and how close to the teacher's, from moments alone.

For the update u(x) = scaling B A x of a linear and features as they come (not centred):

size_teacher   rms of u_t(t) over the deviation of the features it is added to
size_student   the same in the student; both where moments of those features were collected
error          E |u_s(s) - u_t(t) write|^2 / E |u_t(t) write|^2: 0 where the student's linear
               changes as the mapped teacher's does on every token, 1 for no update at all

A large error with a good `r2_write` blames the read map; sizes that differ blame the scale. What
`write` leaves out of the teacher's update is no part of the error: kept.py counts it.
"""

from torch import Tensor

from modxfer_fast.transfer.kinds import Slot
from modxfer_fast.transfer.kinds.lora import A, B
from modxfer_fast.transfer.maps import Maps
from modxfer_fast.transfer.maps.moment_views import on_cpu, uncentred
from modxfer_fast.transfer.modules import PeftModuleState
from modxfer_fast.transfer.moments import Moments
from modxfer_fast.transfer.statistics import Statistics


def lora_updates(
    teacher: PeftModuleState,
    student: PeftModuleState,
    maps: Maps,
    statistics: Statistics,
) -> list[dict]:
    """One row for every slot of the student that has a single source with moments of what it reads.

    Args:
        teacher: the trained LoRA; student: what `transport` made of it through these maps.
        statistics: with Gram matrices; held-out tokens are used if there are any.
    """
    rows = []
    held_out = statistics.facts["held_out_tokens"] >= 2
    for slot, tensors in student.slots.items():
        sources = student.facts["layer_map"]["sources"][slot.layer]
        source = Slot(sources[0], slot.place)
        reads, writes = teacher.role(slot.place)
        if len(sources) > 1 or reads not in statistics.spaces:
            continue
        s, t = slot.layer, source.layer
        at_input = on_cpu(statistics.moments(reads, s, t, held_out=held_out))
        at_output = None
        if writes in statistics.spaces:
            at_output = on_cpu(statistics.moments(writes, s, t, held_out=held_out))
        if at_input.cov_xx is None or at_input.cov_yy is None:
            continue
        mine = _weight(tensors, student.scaling(slot))
        theirs = _weight(teacher.slots[source], teacher.scaling(source))
        write = maps[writes, s, t].write
        rows.append(
            {
                "student": s,
                "teacher": t,
                "place": slot.place,
                **_numbers(mine, theirs, write, uncentred(at_input), at_output),
            }
        )
    return rows


def _weight(tensors, scaling: float) -> tuple[Tensor, Tensor]:
    return tensors[A].double(), scaling * tensors[B].double()


def _numbers(mine, theirs, write: Tensor, features: Moments, at_output: Moments | None) -> dict:
    (a_s, b_s), (a_t, b_t) = mine, theirs
    assert features.cov_xx is not None
    assert features.cov_yy is not None
    mapped = write.T @ b_t
    power_s = _power(a_s, b_s, features.cov_xx)
    power_t = _power(a_t, b_t, features.cov_yy)
    power_mapped = _power(a_t, mapped, features.cov_yy)
    # tr(B_s A_s C_st A_t^T mapped^T), through the ranks
    shared = ((a_s @ features.cov_xy @ a_t.T) * (b_s.T @ mapped)).sum().item()
    error = _over(power_s - 2 * shared + power_mapped, power_mapped)
    if at_output is None:
        return {"error": error}
    return {
        "size_student": _over(power_s, at_output.var_x.sum().item()) ** 0.5,
        "size_teacher": _over(power_t, at_output.var_y.sum().item()) ** 0.5,
        "error": error,
    }


def _power(a: Tensor, b: Tensor, gram: Tensor) -> float:
    """E |B A x|^2 = tr(B A C A^T B^T)."""
    return max(((a @ gram @ a.T) * (b.T @ b)).sum().item(), 0.0)


def _over(value: float, unit: float) -> float:
    return max(value, 0.0) / unit if unit > 0 else 0.0
