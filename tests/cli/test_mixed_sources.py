"""`modxfer distill` of two sources: each is told apart in the report, and weighs what it is to."""

import json

from modxfer_fast.cli.main import main
from tests.cli.conftest import WORDS


def test_two_sources(tmp_path, write_job, capsys):
    chats = tmp_path / "chats"
    chats.mkdir()
    for k in range(2):
        turns = [{"from": "human", "value": f"{WORDS[i]} {k}"} for i in range(10)]
        rows = [
            {"conversations": [turn, {"from": "gpt", "value": " ".join(WORDS[:3])}]}
            for turn in turns
        ]
        (chats / f"{k}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(" ".join(WORDS[(i * j) % 10] for j in range(9)) for i in range(40)))
    sources = [
        {"source": str(chats / "*.jsonl"), "weight": 1.0, "loss_weight": 0.5},
        {"source": str(lines), "weight": 2.0, "lines": True},
    ]
    path, out = write_job(
        tmp_path,
        data={"source": None, "sources": sources, "max_length": 64},
        compare={"ce_only": False, "loss_rows": 4, "loss_repeats": 1},
        training={"max_steps": 6},
    )
    assert main(["distill", str(path)]) == 0
    report = json.loads((out / "report.json").read_text())
    assert (report["data"]["documents"], report["data"]["held_out_documents"]) == (48, 12)
    run = report["runs"][0]
    assert set(run["student"]["sources"]) == {source["source"] for source in sources}
    for label, figures in run["student"]["sources"].items():
        before = run["start"]["sources"][label]
        assert 1 < figures["eval_perplexity"] < before["eval_perplexity"]
        assert 0 < figures["eval_kd"] < before["eval_kd"]
    kl = [figures["eval_kd"] for figures in run["student"]["sources"].values()]
    assert min(kl) < run["student"]["eval_kd"] < max(kl)
    assert "Held-out text of each source" in capsys.readouterr().out
