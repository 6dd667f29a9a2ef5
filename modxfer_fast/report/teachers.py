"""The teachers of a distillation, as its report has them."""

from typing import Any


def teachers_of(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Facts and figures of each teacher, by what tables and plots call it."""
    teacher = report["teacher"]
    if "teachers" not in teacher:
        return {"teacher": teacher}
    return {f"teacher {name}": facts for name, facts in teacher["teachers"].items()}
