"""Commands, exit codes, and messages without tracebacks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from modxfer_fast import __version__
from modxfer_fast.cli import doctor
from modxfer_fast.cli.main import COMMANDS, main
from modxfer_fast.errors import ToldByMain
from modxfer_fast.jobs.store import cache_root
from modxfer_fast.kernels.divergences import DIVERGENCES, FORMULAS

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.strip() == f"modxfer {__version__}"


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize("argv", [["help"], ["help", "distill"], ["distill", "--help"]])
def test_help_is_a_command_too(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 0
    assert ("--resume" in capsys.readouterr().out) == (argv != ["help"])


def test_a_wrong_command_gets_the_nearest_one(capsys):
    with pytest.raises(SystemExit):
        main(["distil"])
    assert "unknown command 'distil'; did you mean 'distill'?" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--local_rank=1", "--local-rank=0"])
def test_the_rank_that_a_launcher_puts_first_is_no_command(flag, capsys):
    assert main([flag, "distill", "absent.yaml"]) == 2
    assert "absent.yaml: no such file" in capsys.readouterr().err


def test_init_lists_the_examples_and_copies_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == sorted(
        path.relative_to(EXAMPLES).with_suffix("").as_posix() for path in EXAMPLES.rglob("*.yaml")
    )
    assert main(["init", "transfer/ner"]) == 0
    assert Path("ner.yaml").read_text() == (EXAMPLES / "transfer" / "ner.yaml").read_text()
    Path("ner.yaml").write_text("mine")
    assert main(["init", "transfer/ner"]) == 2
    assert Path("ner.yaml").read_text() == "mine"
    assert "ner.yaml exists" in capsys.readouterr().err
    assert main(["init", "quickstrt"]) == 2


@pytest.mark.parametrize("job", ["distill", "task", "transfer"])
def test_schema_describes_every_key(job, capsys):
    assert main(["schema", job, "--json"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert main(["schema", job]) == 0
    text = capsys.readouterr().out
    for section in (schema, *schema["$defs"].values()):
        for key in section.get("properties", {}):
            assert f"    {key}: " in text, key


def test_schema_says_type_and_default(capsys):
    assert main(["schema"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "loss.hidden_states" in lines
    names = " or ".join(DIVERGENCES)
    assert f"divergence: {names} or weights by name, by default forward_kl" in lines
    assert any(FORMULAS in line for line in lines)
    assert "workspace_mb: int or null, by default null" in lines
    assert "workspace_mb: int, by default 64" in lines
    assert "output_dir: str, required" in lines


def test_completion_knows_every_command(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert all(name in script for name in COMMANDS)
    assert "--resume" in script


@pytest.mark.parametrize("argv", [[], ["distil"], ["distill"], ["doctor", "--jsn"]])
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: modxfer" in capsys.readouterr().err


def refused_by_torch():
    """What torch raises on a full disk."""
    with pytest.raises(RuntimeError) as caught:
        torch.save(torch.zeros(100_000), "/dev/full")
    return caught.value


def test_a_full_disk_is_no_fault_of_the_program(tmp_path, capsys, monkeypatch):
    from safetensors import SafetensorError

    for error in (
        OSError(28, "No space left on device"),
        OSError(27, "File too large"),
        Exception("No space left on device (os error 28)"),  # of tokenizers
        SafetensorError("I/O error: No space left on device (os error 28)"),
        refused_by_torch(),
        RuntimeError("basic_ios::clear: iostream error"),  # when the last block has no room
    ):
        error.add_note("checkpoint-4 is whole")

        def run(args, error=error):
            raise error

        monkeypatch.setattr(doctor, "run", run)
        assert main(["doctor"]) == 2
        assert "cannot write, the disk is full or refuses" in (message := capsys.readouterr().err)
        assert str(error) in message
        assert message.endswith("\n  checkpoint-4 is whole\n")
    monkeypatch.setattr(doctor, "run", lambda args: (tmp_path / "absent").read_text())
    assert main(["doctor"]) == 1  # any other failure of a file is


def test_cheap_commands_import_no_trainer():
    code = (
        "import sys; from modxfer_fast.cli.main import main; main(['doctor', '--json']);"
        "heavy = {'transformers', 'deepspeed', 'datasets', 'peft', 'matplotlib', 'rich'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_what_torch_alone_can_do():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['pydantic', 'transformers', 'yaml']));"
        "from modxfer_fast.cli.main import main;"
        "assert main(['doctor', '--json']) == 0; sys.exit(main(['distill', 'job.yaml']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert "is not installed; pip install 'modxfer-fast[engine]'" in done.stderr


def test_doctor_json(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    names = {"version", "torch", "triton", "engine", "cache", "devices", "cpu_isa", "rooms"}
    assert set(facts) == names
    assert facts["cpu_isa"]["in_use"] in facts["cpu_isa"]["has"]
    assert facts["engine"]["transformers"] == transformers.__version__
    assert facts["cache"] == str(cache_root())
    assert facts["devices"][0].startswith("cpu")
    assert {"kd_loss", "linear_kd_loss"} <= set(facts["rooms"])
    for backends in facts["rooms"].values():
        assert backends["reference"] == {"available": True, "reason": ""}
        for state in backends.values():
            assert set(state) == {"available", "reason"}
            assert state["available"] or state["reason"]


def test_doctor_table(capsys, monkeypatch):
    rooms = {"kd_loss": {"triton": {"available": False, "reason": "no GPU"}}}
    facts = {"version": "1", "torch": "2", "triton": None, "devices": ["cpu"], "rooms": rooms}
    facts |= {"engine": {"peft": "3", "deepspeed": None}, "cache": "/there"}
    facts["cpu_isa"] = {"in_use": "avx2", "has": ["baseline", "avx2"]}
    monkeypatch.setattr("modxfer_fast.jobs.doctor.collect", lambda: facts)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "triton       not installed" in out
    assert "deepspeed    not installed; pip install 'modxfer-fast[engine]'" in out
    assert "cpu isa      avx2 of baseline, avx2\n" in out
    assert out.strip().endswith("kd_loss  triton     no   no GPU")


def test_user_errors_have_no_traceback(capsys):
    assert main(["distill", "absent.yaml"]) == 2
    assert capsys.readouterr().err == "modxfer: absent.yaml: no such file\n"


def test_errors_name_the_process_of_a_job(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["distill", "absent.yaml"]) == 2
    assert capsys.readouterr().err == "modxfer [rank 1]: absent.yaml: no such file\n"


def test_what_the_main_process_has_told_is_not_told_again(capsys, monkeypatch):
    def run(args):
        raise ToldByMain

    monkeypatch.setattr(doctor, "run", run)
    assert main(["doctor"]) == 2
    assert capsys.readouterr().err == ""


def test_other_errors_say_where(capsys, monkeypatch):
    monkeypatch.setattr("modxfer_fast.jobs.doctor.collect", lambda: {}["absent"])
    assert main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert "KeyError: 'absent'" in err
    assert "test_main.py" in err
    assert "Traceback" not in err


def test_debug_shows_tracebacks(monkeypatch):
    monkeypatch.setattr("modxfer_fast.jobs.doctor.collect", lambda: {}["absent"])
    with pytest.raises(KeyError):
        main(["doctor", "--debug"])


def test_interrupt(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("modxfer_fast.jobs.doctor.collect", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "modxfer: interrupted\n"
