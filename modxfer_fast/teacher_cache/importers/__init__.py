"""What other programs kept of a teacher, into a `TeacherCache`.

    vllm         hidden states, a safetensors file a prompt, as vLLM's example connector and
                 speculators write them
    axolotl      columns of log-probabilities of top-K classes
    distillkit   rows of compressed ones

Nobody wrote down which layer, or which token, theirs are of. So each format has readings, of which
one is taken, and its word is compared with the text: see `check_reading`.
"""

from modxfer_fast.teacher_cache.importers.axolotl import AxolotlColumns
from modxfer_fast.teacher_cache.importers.distillkit import DistillKitRows
from modxfer_fast.teacher_cache.importers.entries import Entry, Foreign, ImportRefused, TeacherHead
from modxfer_fast.teacher_cache.importers.importing import Imported, import_answers
from modxfer_fast.teacher_cache.importers.vllm import HiddenStatesFiles

FORMATS: dict[str, type[Foreign]] = {
    form.name: form for form in (HiddenStatesFiles, AxolotlColumns, DistillKitRows)
}

__all__ = [
    "FORMATS",
    "AxolotlColumns",
    "DistillKitRows",
    "Entry",
    "Foreign",
    "HiddenStatesFiles",
    "ImportRefused",
    "Imported",
    "TeacherHead",
    "import_answers",
]
