"""What the person sees."""

import pytest
from PIL import Image
from transformers import TrainerControl, TrainerState, TrainingArguments

from modxfer_fast.engine.samples import Sample
from modxfer_fast.report import ConsoleCallback, JobConsole, curves, plot_curves
from modxfer_fast.report import console as console_module


def run_callback(console):
    callback, state, control = ConsoleCallback(console), TrainerState(), TrainerControl()
    args = TrainingArguments(output_dir="unused", report_to="none")
    state.max_steps = 4
    callback.on_log(args, state, control, logs={"eval_perplexity": 9.0})  # evaluation on its own
    callback.on_train_begin(args, state, control)
    state.global_step = 2
    callback.on_step_end(args, state, control)
    logs = {"loss": 1.25, "kd_loss": 0.5, "tokens_per_s": 12345.6, "epoch": 0.1}
    callback.on_log(args, state, control, logs=logs)
    callback.on_train_end(args, state, control)


def test_phases_and_numbers_without_a_terminal(capsys):
    console = JobConsole(is_main=True)
    with console.phase("Teacher"):
        run_callback(console)
    console.table("Results", [("model", ""), ("perplexity", ".1f")], [["teacher", 12.34]])
    out = capsys.readouterr().out
    assert "Teacher" in out
    assert "step 2/4  loss 1.25  kd 0.5  tokens/s 12,346" in out
    assert "epoch" not in out
    assert "12.3" in out
    assert console.phase_seconds["Teacher"] > 0


def test_brackets_and_colons_of_names_are_no_markup(capsys):
    console = JobConsole(is_main=True)
    name = "run[/1]/part-[a-z]*.jsonl :smile: [bold]"
    with console.phase(name):
        console.say(name)
    console.table(name, [(name, "")], [[name]])
    ConsoleCallback(console).on_samples(1, [Sample("[b]", "", "[/b]", "x" * 33 + "[bold]")])
    out = capsys.readouterr().out
    assert out.count(name) == 5
    assert all(text in out for text in ("[b]", "[/b]", "x" * 33 + "[b…"))


def test_other_processes_are_silent(capsys):
    console = JobConsole(is_main=False)
    with console.phase("Teacher"):
        console.say("hello")
        run_callback(console)
    console.table("Results", [("model", "")], [["teacher"]])
    assert capsys.readouterr().out == ""


def test_seconds_of_a_phase_inside_another_count_once(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 3.0, 4.0, 6.0, 8.0])
    monkeypatch.setattr(console_module.time, "perf_counter", lambda: next(clock))
    console = JobConsole(is_main=False)
    with console.phase("Teacher"):
        with console.phase("Teacher, pretrained"):
            pass
        with pytest.raises(RuntimeError), console.phase("Failed"):
            raise RuntimeError
        with console.phase("Scored"):
            pass
    assert console.phase_seconds == {"Teacher, pretrained": 2.0, "Scored": 2.0, "Teacher": 4.0}


def test_a_failed_phase_is_not_counted():
    console = JobConsole(is_main=False)
    with pytest.raises(RuntimeError, match="x"), console.phase("Teacher"):
        raise RuntimeError("x")
    assert console.phase_seconds == {}


@pytest.mark.parametrize("with_parts", [True, False])
@pytest.mark.parametrize("with_evaluations", [True, False])
def test_plot(tmp_path, with_evaluations, with_parts):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    if with_evaluations:
        history.append({"step": 2, "eval_perplexity": 30.0, "eval_kd": float("nan")})
    trained = {"history": history, "eval_perplexity": 30.0, "eval_kd": 0.5}
    report = {
        "config": {
            "kind": "causal_lm",
            "loss": {"divergence": "forward_kl", "temperature": 1.0},
        },
        "teacher": {"eval_perplexity": 12.0},
        "runs": [
            {
                "start": {"eval_perplexity": 60.0, "eval_kd": 2.0},
                "student": trained,
                "ce_only": trained,
            },
            {"start": {"eval_perplexity": 61.0, "eval_kd": 2.1}, "student": trained},
        ],
    }
    if with_parts:
        steps = {name: {"step_ms": 3.0, "peak_mib": 4.0} for name in ("fused", "lora", "plain")}
        report["parts"] = {"tokens": 8, "steps": steps}
        report["runs"][0]["logit_kd"] = trained
    plot_curves(report, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        assert image.width == 600 * (5 if with_parts else 3)
        assert image.width > image.height > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10


@pytest.mark.parametrize("teacher", [{"eval_perplexity": 12.0}, {"plan": "served"}])
def test_a_language_model_has_its_curves_whatever_teaches_it(tmp_path, monkeypatch, teacher):
    saved = []
    monkeypatch.setattr(curves, "save_png", lambda figure, path: saved.append(figure))
    figures = {"eval_perplexity": 60.0, "eval_kd": 2.0}
    report = {
        "config": {
            "kind": "causal_lm",
            "loss": {"divergence": "forward_kl", "temperature": 1.0},
        },
        "teacher": teacher,
        "runs": [{"start": figures, "student": {"history": [{"step": 2, "loss": 1.5, **figures}]}}],
    }
    plot_curves(report, tmp_path / "curves.png")
    perplexity, distance, _ = saved[0].axes
    assert perplexity.get_title(loc="left") == "held-out perplexity"
    assert distance.get_title(loc="left").startswith("held-out KL")
    labels = perplexity.get_legend_handles_labels()[1]
    assert ("teacher" in labels) == ("eval_perplexity" in teacher)


def test_plot_of_an_encoder(tmp_path):
    figures = {"eval_hidden_loss": 1.0, "eval_hidden_cosine": 0.2}
    start = figures | {"eval_hidden_cosine_1_2": 0.1, "eval_hidden_cosine_2_3": 0.3}
    history = [{"step": 2, "loss": 1.5}, {"step": 4, **start, "eval_hidden_cosine_1_2": 0.6}]
    report = {
        "config": {"kind": "encoder"},
        "teacher": {},
        "runs": [{"start": start, "student": {"history": history}}] * 2,
    }
    plot_curves(report, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width == 1800
        assert len(image.convert("RGB").getcolors(1 << 24)) > 10
