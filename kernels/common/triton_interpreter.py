"""Triton's interpreter beside NumPy 2.4 and later, and without its dearest habit.

It holds scalars as arrays of one element, and NumPy no longer makes a number of those: the bound of
a loop, `range(0, D, BLOCK_D)`, raises. Triton 3.9 squeezes them; earlier ones are taught to here.

Each call of a jit function, nested ones included, also replaces some hundred members of the
language by what NumPy does for them, two thirds of a kernel's time. Here they stay replaced.
Imported by whatever defines kernels, where `TRITON_INTERPRET=1` is set.
"""

from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor
_patch_lang = interpreter._patch_lang
_patched: set[str] = set()


def _patch_lang_tensor_and_index(tensor, scope) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


def _patch_lang_once(fn):
    """What to replace depends on the names of the language that the function's module imports."""
    if fn.__module__ not in _patched:
        _patch_lang(fn)
        _patched.add(fn.__module__)
    return interpreter._LangPatchScope()  # which has nothing to restore


interpreter._patch_lang_tensor = _patch_lang_tensor_and_index
interpreter._patch_lang = _patch_lang_once
