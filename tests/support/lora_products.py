"""The sums of products of csrc/cuda in plain PyTorch, for tests of what is asked of them."""

from modxfer_fast.kernels.lora_linear import cuda_products


def plain_sums(monkeypatch) -> list[tuple[str, list[int], bool, bool]]:
    """Puts plain PyTorch in the place of the kernel, for results of every size.

    Returns:
        What is asked of it from now on: "y" or "dx", terms of each pair, whether there is an addend
        and a bias.
    """
    asked = []

    def plain(pairs, addend, bias, result, *, rights_in_rows) -> None:
        assert addend is None or addend is result or rights_in_rows
        total = sum(
            left.float() @ (right.t() if rights_in_rows else right).float() for left, right in pairs
        )
        for added in (addend, bias):
            total = total if added is None else total + added.float()
        result.copy_(total)
        terms = [left.shape[1] for left, _ in pairs]
        name = "y" if rights_in_rows else "dx"
        asked.append((name, terms, addend is not None, bias is not None))

    monkeypatch.setattr(cuda_products, "sum_of_products", plain)
    monkeypatch.setattr(cuda_products, "fills_gpu", lambda *sizes: True)
    monkeypatch.setattr(cuda_products, "is_hopper", lambda device: True)
    monkeypatch.setattr(cuda_products, "is_built", lambda: (True, ""))
    return asked
