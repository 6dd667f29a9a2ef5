"""What a teacher answered, on disk: each document once, found by its tokens, checked as it is read.

FOLDER/
    teacher/              who answered: facts in the marker, its head beside it where it is needed
    shards/<name>/        what it answered to some documents: answers.safetensors

Both are sealed folders (files.py), complete or absent. A document is what attends to itself alone:
a row, or one of the pieces packed into a row. So neither the order of rows, nor how they are packed
or batched, means anything here.
"""

from modxfer_fast.teacher_cache.documents import Document, documents_in, documents_of, key_of
from modxfer_fast.teacher_cache.store import CacheError, Payload, TeacherCache

__all__ = [
    "CacheError",
    "Document",
    "Payload",
    "TeacherCache",
    "documents_in",
    "documents_of",
    "key_of",
]
