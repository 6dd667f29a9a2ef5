"""What the main rank does for all of them."""

from collections.abc import Callable
from pathlib import Path
from time import sleep
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

_POLL_S = 1.0  # between two looks at whether the main rank has done


def on_main(compute: Callable[[], Any], ended: Path | None = None) -> Any:
    """What `compute` returns on the main rank, on every rank; its ValueError, or one of the disk,
    too. Collective.

    Args:
        ended: a path that all ranks see, of what may take longer than a collective waits: they then
            wait for the file that the main rank makes there, and not in a collective.
    """
    outcome: list[Any] = [None, None]
    state = PartialState()
    if ended is not None:
        if state.is_main_process:  # of an interrupted run
            ended.unlink(missing_ok=True)
        state.wait_for_everyone()
    if state.is_main_process:
        try:
            outcome[0] = compute()
        except (ValueError, OSError) as error:
            outcome[1] = error
        finally:  # whatever the error: nobody waits for what will not come
            if ended is not None:
                ended.touch()
    while ended is not None and not ended.exists():
        sleep(_POLL_S)
    value, refusal = broadcast_object_list(outcome)
    if state.is_main_process and ended is not None:
        ended.unlink()
    if refusal is not None:
        raise refusal
    return value
