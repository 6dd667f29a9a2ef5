"""Best-fit packing: several pieces in one row, each still a document of its own.

A row is `{"input_ids", "is_target", "lengths"}`, sum(lengths) == len(input_ids) <= max_length,
and a list with one value a document of each fact (facts.py). Where the teacher reads prompts of its
own there are `{"teacher_input_ids", "teacher_is_target", "teacher_lengths"}` of it, within the same
bound.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from itertools import chain

from modxfer_fast.data.facts import FACTS, OF_TEACHER, TEACHER

Columns = dict[str, list]  # a batch of `Dataset.map(batched=True)`


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Indices of pieces per row: longest first, each into the fullest row that still has room."""
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # rows by free tokens
    rooms: list[int] = []  # the keys, ascending
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        place = bisect_left(rooms, length)
        if place == len(rooms):
            rows.append([index])
            row, room = len(rows) - 1, capacity
        else:
            room = rooms[place]
            row = with_room[room].pop()
            rows[row].append(index)
            if not with_room[room]:
                del with_room[room], rooms[place]
        free = room - length
        if free and free not in with_room:
            insort(rooms, free)
            with_room[free] = []
        if free:
            with_room[free].append(row)
    return rows


def packer(max_length: int, *, packing: bool) -> Callable[[Columns], Columns]:
    """A function for `Dataset.map(batched=True)` that turns pieces that have tokens into rows.

    Pieces that different teachers are asked about come into different rows, so that each teacher
    reads its own alone.
    """

    def pack_batch(pieces: Columns) -> Columns:
        lengths = [len(ids) for ids in pieces["input_ids"]]
        of_teacher = [name for name in OF_TEACHER if name in pieces]
        sizes, teacher_lengths = lengths, []
        if of_teacher:
            teacher_lengths = [len(ids) for ids in pieces[of_teacher[0]]]
            sizes = list(map(max, lengths, teacher_lengths))
        filled = [i for i, length in enumerate(lengths) if length]
        if packing:
            groups: dict[int, list[int]] = {}
            for i in filled:
                groups.setdefault(pieces[TEACHER][i] if TEACHER in pieces else 0, []).append(i)
            rows = [
                [own[k] for k in row]
                for _, own in sorted(groups.items())
                for row in best_fit([sizes[i] for i in own], max_length)
            ]
        else:
            rows = [[i] for i in filled]
        joined = ("input_ids", "is_target", *of_teacher)
        counted = {"lengths": lengths} | (
            {"teacher_lengths": teacher_lengths} if of_teacher else {}
        )
        return {
            **{
                name: [list(chain(*(pieces[name][i] for i in row))) for row in rows]
                for name in joined
            },
            **{name: [[of[i] for i in row] for row in rows] for name, of in counted.items()},
            **{
                fact: [[pieces[fact][i] for i in row] for row in rows]
                for fact in FACTS
                if fact in pieces
            },
        }

    return pack_batch
