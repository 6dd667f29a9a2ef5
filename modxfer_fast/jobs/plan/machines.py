"""GPUs as numbers: what their makers promise, and what of it is kept."""

from typing import NamedTuple

PRODUCTS = 0.77  # of dense bf16: what an H200 has been seen to keep up in large products


class Machine(NamedTuple):
    """A GPU in a node.

    Attributes:
        gib: of its memory.
        tflops: dense bf16, per second.
        memory_gb_s: gigabytes per second that it reads of its memory.
        node_gb_s: gigabytes per second to another GPU of the node, in one direction.
        net_gb_s: to another node.
        per_node: GPUs of a node.
    """

    gib: float
    tflops: float
    memory_gb_s: float
    node_gb_s: float
    net_gb_s: float
    per_node: int = 8


MACHINES = {
    "a100": Machine(80, 312, 2039, 300, 25),
    "h100": Machine(80, 989, 3350, 450, 50),
    "h200": Machine(141, 989, 4800, 450, 50),
    "b200": Machine(180, 2250, 8000, 900, 50),
    "mi300x": Machine(192, 1307, 5300, 448, 50),
}
