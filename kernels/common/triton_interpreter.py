"""Triton's interpreter beside NumPy 2.4 and later.

It holds scalars as arrays of one element, and NumPy no longer makes a number of those: the bound of
a loop, `range(0, D, BLOCK_D)`, raises. Triton 3.9 squeezes them; earlier ones are taught to here.
Imported by whatever defines kernels, where `TRITON_INTERPRET=1` is set.
"""

from triton.runtime import interpreter

_patch_lang_tensor = interpreter._patch_lang_tensor


def _patch_lang_tensor_and_index(tensor, scope) -> None:
    _patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))


interpreter._patch_lang_tensor = _patch_lang_tensor_and_index
