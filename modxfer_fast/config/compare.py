"""The compare sections: what is measured beside a distilled student."""

from modxfer_fast.config.section import PositiveInt, Section


class CompareSection(Section):
    """What to measure beside the distilled student.

    ce_only: train the same student with cross entropy alone, from the same start, on the same
        batches.
    loss_rows: time fused and dense loss on one batch of that many rows; null leaves it out.
    parts: what each part of the job gains. In quality: the same student with cross entropy alone,
        then with the loss of the logits, then with everything. In cost: a step as it is, and with
        each fused part replaced by its plain counterpart, on a batch of `loss_rows` rows or 32.
    """

    ce_only: bool = False
    parts: bool = False
    loss_rows: PositiveInt | None = None
    loss_repeats: PositiveInt = 5


class TaskCompareSection(Section):
    """ce_only: train the same student on the labels alone, from the same start, equal steps."""

    ce_only: bool = False
