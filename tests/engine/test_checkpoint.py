"""Markers and folders that are either whole or not there."""

import pytest

from modxfer_fast.engine.checkpoint import (
    CheckpointInfo,
    atomic_folder,
    check_files,
    last_complete_checkpoint,
    mark_complete,
    read_marker,
)

INFO = CheckpointInfo(
    global_step=3, world_size=2, zero_stage=None, num_tokens=17, loss_sum=2.5, seconds=1.5
)


def test_marker_round_trip(tmp_path):
    mark_complete(tmp_path, INFO)
    assert read_marker(tmp_path) == INFO
    assert [path.name for path in tmp_path.iterdir()] == ["complete.json"]
    (tmp_path / "complete.json").unlink()
    with pytest.raises(ValueError, match=r"has no readable complete\.json"):
        read_marker(tmp_path)


def test_newest_whole_checkpoint_is_found_by_step(tmp_path):
    assert last_complete_checkpoint(tmp_path / "missing") is None
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "checkpoint-x"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-x"):
        mark_complete(tmp_path / name, INFO)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_damaged_checkpoint_is_named_and_an_older_whole_one_taken(tmp_path):
    for step in (4, 8):
        folder = tmp_path / f"checkpoint-{step}"
        (folder / "global_step").mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(bytes(100))
        (folder / "global_step" / "rank0.pt").write_bytes(bytes(100))
        mark_complete(folder, INFO)
    newest = tmp_path / "checkpoint-8"
    check_files(newest)
    flipped = bytearray(100)
    flipped[50] ^= 1
    (newest / "global_step" / "rank0.pt").write_bytes(flipped)
    (newest / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-8 is damaged.*rank0\.pt, model\.saf"):
        check_files(newest)
    told = []
    assert last_complete_checkpoint(tmp_path, told.append) == str(tmp_path / "checkpoint-4")
    assert told.pop().endswith(
        "checkpoint-8 is damaged (global_step/rank0.pt, model.safetensors): training goes on from "
        "checkpoint-4"
    )
    (tmp_path / "checkpoint-4" / "complete.json").write_text('{"global_st')
    assert last_complete_checkpoint(tmp_path, told.append) is None
    assert told.pop().endswith("training goes on from the first step")


def test_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "out" / "model"

    def fail():
        with atomic_folder(target) as folder:
            (folder / "a.txt").write_text("half")
            raise RuntimeError("full disk")

    with pytest.raises(RuntimeError, match="full disk"):
        fail()
    assert not target.exists()
    assert list(target.parent.iterdir()) == []
    with atomic_folder(target) as folder:
        (folder / "a.txt").write_text("whole")
        assert not target.exists()
    assert (target / "a.txt").read_text() == "whole"
    assert list(target.parent.iterdir()) == [target]


def test_existing_folder_keeps_its_other_files(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    (tmp_path / "model" / "a.txt").write_text("old")
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "b.txt").write_text("new")
        (folder / "a.txt").write_text("new")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    assert (tmp_path / "model" / "a.txt").read_text() == "new"
    assert (tmp_path / "model" / "sub" / "b.txt").read_text() == "new"
