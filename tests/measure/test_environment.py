"""What a measurement says of its machine."""

from modxfer_fast.measure import environment


def test_the_commit_of_a_copy_without_git_is_told(monkeypatch):
    monkeypatch.setenv("MODXFER_COMMIT", "0123abc")
    assert environment.describe("cpu")["commit"] == "0123abc"
