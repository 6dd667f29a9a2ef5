"""One rank of `run_distributed`: python -m modxfer_fast.testing.worker FILE FUNCTION FOLDER."""

import faulthandler
import importlib.util
import os
import signal
import sys
from pathlib import Path

import torch


def main(file: str, function: str, folder: str) -> None:
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    args = torch.load(Path(folder) / "args.pt", weights_only=False)
    result = getattr(module, function)(*args)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    torch.save(result, Path(folder) / f"result{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
