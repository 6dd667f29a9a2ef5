"""Files and folders are complete or absent."""

import json
import stat

import pytest

from modxfer_fast.report import new_folder, replace_folder, write_json, write_text


def test_text_replaces_the_old(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_failed_write_leaves_the_old(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_json_is_standard(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"nan": float("nan"), "inf": [float("inf"), 1.5], "nested": {1: (2, 3)}})
    assert json.loads(path.read_text()) == {
        "nan": None,
        "inf": [None, 1.5],
        "nested": {"1": [2, 3]},
    }


def test_folder_appears_whole(tmp_path):
    target = tmp_path / "deep" / "result"
    with new_folder(target) as scratch:
        (scratch / "a").write_text("x")
        assert not target.exists()
    assert (target / "a").read_text() == "x"
    assert stat.S_IMODE(target.stat().st_mode) == 0o755
    assert [p.name for p in target.parent.iterdir()] == ["result"]


def test_folder_does_not_appear_after_a_failure(tmp_path):
    def fail():
        with new_folder(tmp_path / "result") as scratch:
            (scratch / "a").write_text("x")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_folder_replaces_an_older_one(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    (old / "stale").touch()
    new.mkdir()
    (new / "fresh").touch()
    replace_folder(new, old)
    assert [p.name for p in old.iterdir()] == ["fresh"]
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
