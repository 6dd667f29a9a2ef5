"""The kernels as a folder that the Hugging Face `kernels` library loads.

    python -m modxfer_fast.compat.hub FOLDER

    FOLDER/build/torch-cuda/    and torch-rocm, torch-cpu, each whole in itself
        metadata.json           name, version and backend, as the library reads them
        __init__.py             the public functions, and `layers`
        layers.py               nn.Modules whose `forward` the library puts into others
        ...                     the rooms of `modxfer_fast.kernels`

A kernel of the library is loaded from any path, under a name of its own, beside other versions of
itself. So imports become relative, and ops get a namespace that is made from their sources. The
variants are the same pure Python: Triton on GPUs; on a CPU the C++ library where modxfer_fast is
installed too, else the reference.
"""

import argparse
import hashlib
import json
import re
from pathlib import Path

import modxfer_fast.kernels
from modxfer_fast.files import new_folder

__all__ = ["write_kernel"]

_NAME = "modxfer-fast"
_BACKENDS = ("cuda", "rocm", "cpu")
_PACKAGE = modxfer_fast.kernels.__name__

_INIT = '''"""Fused losses of knowledge distillation, from hidden states and output heads."""

from . import layers
from .dispatch import BackendError, use_backend
from .kd_loss import kd_loss
from .linear_kd_loss import KDTerms, linear_kd_loss, linear_kd_loss_terms

__all__ = [
    "BackendError",
    "KDTerms",
    "kd_loss",
    "layers",
    "linear_kd_loss",
    "linear_kd_loss_terms",
    "use_backend",
]
'''

_LAYERS = '''"""Losses without a state; each reads the options of the module it is put into."""

from torch import Tensor, nn

from .linear_kd_loss import linear_kd_loss


class LinearKDLoss(nn.Module):
    """`linear_kd_loss` for a module that may have divergence, alpha, beta, temperature,
    kd_weight, ce_weight, label_smoothing, z_loss_weight and ignore_index; what it has not is the
    default."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        names = (
            *("divergence", "alpha", "beta", "temperature", "kd_weight", "ce_weight"),
            *("label_smoothing", "z_loss_weight", "ignore_index"),
        )
        options = {name: getattr(self, name) for name in names if hasattr(self, name)}
        return linear_kd_loss(
            student_hidden, student_weight, teacher_hidden, teacher_weight, labels=labels, **options
        )


class LigerFusedLinearJSD(nn.Module):
    """For Liger's module of this name, whose jsd_beta, temperature and ignore_index it reads."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor,
        teacher_weight: Tensor,
        shift_labels: Tensor | None = None,
    ) -> Tensor:
        return linear_kd_loss(
            student_input,
            student_weight,
            teacher_input,
            teacher_weight,
            labels=shift_labels,
            divergence="jsd",
            beta=self.jsd_beta,
            temperature=self.temperature,
            ignore_index=self.ignore_index,
        )
'''


def write_kernel(folder: str | Path, *, version: int = 1) -> Path:
    """Writes the folder, for `kernels.get_local_kernel` or an upload to the hub.

    Args:
        folder: the repository; its `build` must not exist.
        version: of the kernel, a positive number.

    Returns:
        `folder`.

    Raises:
        FileExistsError: `folder` has a `build`.
        ValueError: the version.
    """
    folder = Path(folder)
    if version < 1:
        raise ValueError(f"version: expected a positive number, got {version}")
    files = _sources()
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:8]
    namespace = f"modxfer_fast_{digest}"
    files = {path: _namespaced(text, namespace) for path, text in files.items()}
    if (folder / "build").exists():
        raise FileExistsError(f"folder: expected one without a build, got {folder}")
    with new_folder(folder / "build") as build:
        for backend in _BACKENDS:
            metadata = {
                "id": f"_{namespace}_{backend}",
                "name": _NAME,
                "version": version,
                "license": "Apache-2.0",
                "python-depends": [],
                "backend": {"type": backend},
            }
            told = json.dumps(metadata, indent=2) + "\n"
            for path, text in {**files, "metadata.json": told}.items():
                target = build / f"torch-{backend}" / path
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text, encoding="utf-8")
    return folder


def _sources() -> dict[str, str]:
    """Path -> text of the Python files of a variant."""
    root = Path(modxfer_fast.kernels.__path__[0])
    files = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        files["/".join(parts)] = _relative(path.read_text(encoding="utf-8"), len(parts))
    return {**files, "__init__.py": _INIT, "layers.py": _LAYERS}


def _relative(text: str, depth: int) -> str:
    """Imports of our package become those of a package of any name; `depth` 1 is its top folder."""
    dots = "." * depth
    text = re.sub(rf"(?m)^(\s*)from {_PACKAGE} import", rf"\1from {dots} import", text)
    return re.sub(rf"(?m)^(\s*)from {_PACKAGE}\.", rf"\1from {dots}", text)


def _namespaced(text: str, namespace: str) -> str:
    text = re.sub(r"\bmodxfer::", f"{namespace}::", text)
    return re.sub(r"\btorch\.ops\.modxfer\b", f"torch.ops.{namespace}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--version", type=int, default=1)
    arguments = parser.parse_args()
    print(write_kernel(arguments.folder, version=arguments.version))


if __name__ == "__main__":
    main()
