"""Events of one step as torch's profiler exports them."""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

# read when the profiler first starts; it would announce itself on the console
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def trace(
    step: Callable[[], Any], activities: Sequence[ProfilerActivity], profile_memory: bool = False
) -> tuple[list[dict[str, Any]], Any]:
    """Events in the order of their time, and what `step` returned."""
    with profile(activities=activities, profile_memory=profile_memory) as recorded:
        results = step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return sorted(events, key=lambda event: event.get("ts", 0)), results
