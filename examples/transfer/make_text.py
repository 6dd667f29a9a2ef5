"""Writes `text.txt` for the students of a grid or job: the training sentences of all its tasks.

One sentence a line, without labels, each once. Held-out sentences of the tasks stay out, and so do
those that happen to stand in a training split as well.
    python examples/transfer/make_text.py examples/transfer/grid.yaml text.txt
"""

import sys

from modxfer_fast.config.grid import Grid, load_transfer
from modxfer_fast.data.tasks import load_task


def lines(task, split: str) -> list[str]:
    """The sentences of a split: the words of an example, or both texts of a pair."""
    texts = task.texts(split)
    if task.kind == "ner":
        return [" ".join(words) for words in texts]
    return [text for pair in texts for text in pair]


def main(grid: str, output: str) -> None:
    sections = {}  # each task once; the fraction that students see does not matter here
    loaded = load_transfer(grid)
    jobs = [cell.job for cell in loaded.cells] if isinstance(loaded, Grid) else [loaded]
    for job in jobs:
        section = job.task.model_copy(update={"train_fraction": 1.0})
        sections[section.model_dump_json()] = section
    tasks = [load_task(section) for section in sections.values()]
    held_out = {
        line for task in tasks for split in ("validation", "test") for line in lines(task, split)
    }
    kept = dict.fromkeys(
        line for task in tasks for line in lines(task, "train") if line not in held_out
    )
    with open(output, "w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in kept)
    print(f"{output}: {len(kept):,} sentences of {len(tasks)} tasks")


if __name__ == "__main__":
    main(*sys.argv[1:])
