"""Which matrix products a step makes."""

from torch.profiler import ProfilerActivity, profile


def gemms(step) -> list[list[int]]:
    """[M, N, K] of every matrix product that runs inside `step`."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        step()
    products = []
    for event in recorded.events():
        if event.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::matmul", "aten::bmm"):
            left, right = [shape for shape in event.input_shapes if len(shape) == 2][-2:]
            if event.name == "aten::mm":
                left, right = event.input_shapes[:2]
            products.append([left[0], right[1], left[1]])
    return products
