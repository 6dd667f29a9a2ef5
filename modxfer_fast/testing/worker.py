"""One rank of `Ranks`: python -m modxfer_fast.testing.worker, a job as a line of JSON on stdin."""

import faulthandler
import gc
import importlib.util
import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from types import ModuleType

import torch


def main() -> None:
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    jobs: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
    lines = os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    threading.Thread(target=_listen, args=(lines, jobs), daemon=True).start()
    modules = 0
    while (job := jobs.get()) is not None:
        _forget_the_last_job(job["environment"])
        if len(sys.modules) > modules:
            gc.freeze()  # what was imported; half a second for each collection that looks at it
            modules = len(sys.modules)
        _run(**job)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _listen(lines, jobs: queue.SimpleQueue) -> None:
    """Ends this rank and its children with the process that started it, whatever it is doing."""
    for line in lines:
        jobs.put(job := json.loads(line))
        if job is None:
            return
    os.killpg(0, signal.SIGKILL)


def _run(file: str, function: str, folder: str, environment: dict[str, str]) -> None:
    module = _imported(file)
    args = torch.load(Path(folder) / "args.pt", weights_only=False)
    result = getattr(module, function)(*args)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    path = Path(folder) / f"result{environment['RANK']}.pt"
    torch.save(result, path.with_suffix(".partial"))
    path.with_suffix(".partial").rename(path)  # its name says that it is whole


def _imported(file: str) -> ModuleType:
    name = Path(file).stem
    known = sys.modules.get(name)
    if known is not None and known.__file__ == file:
        return known
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file}: expected a file of Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _forget_the_last_job(environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    if deepspeed := sys.modules.get("transformers.integrations.deepspeed"):
        deepspeed.unset_hf_deepspeed_config()
    gc.collect()


if __name__ == "__main__":
    main()
