"""What the refinement of a moved module reads and compares: texts, and hidden states."""

from datasets import Dataset

from modxfer_fast.engine.tasks.distillation import TaskHiddenOptions
from modxfer_fast.transfer import LayerMap, Maps


def hidden_options(maps: Maps, layer_map: LayerMap, weight: float) -> TaskHiddenOptions:
    """Outputs of the blocks that `layer_map` pairs, compared through their `maps`."""
    return TaskHiddenOptions(
        layers={s + 1: t + 1 for s, t in layer_map.pairs},
        maps={s + 1: maps["layer_out", s, t] for s, t in layer_map.pairs},
        weight=weight,
    )


def text_rows(texts: list) -> Dataset:
    """Texts of a task, words or pairs, as rows of `TaskTextCollator`."""
    if isinstance(texts[0], tuple):
        return Dataset.from_dict({"text_a": [a for a, _ in texts], "text_b": [b for _, b in texts]})
    return Dataset.from_dict({"words": list(texts)})
