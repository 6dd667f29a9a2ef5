"""Commands, exit codes, and messages without tracebacks."""

import json
import subprocess
import sys

import pytest

from modxfer_fast import __version__
from modxfer_fast.cli import doctor
from modxfer_fast.cli.main import COMMANDS, main


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


@pytest.mark.parametrize("argv", [[], ["distil"], ["distill"], ["doctor", "--jsn"]])
def test_wrong_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "usage: modxfer" in capsys.readouterr().err


def test_a_full_disk_is_no_fault_of_the_program(tmp_path, capsys, monkeypatch):
    from safetensors import SafetensorError

    for error in (
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ):

        def run(args, error=error):
            raise error

        monkeypatch.setattr(doctor, "run", run)
        assert main(["doctor"]) == 2
        assert "cannot write" in (message := capsys.readouterr().err)
        assert "No space left on device" in message
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
    assert set(facts) == {"version", "torch", "triton", "devices", "rooms"}
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
    monkeypatch.setattr(doctor, "collect", lambda: facts)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "not installed" in out
    assert out.strip().endswith("kd_loss  triton     no   no GPU")


def test_user_errors_have_no_traceback(capsys):
    assert main(["distill", "absent.yaml"]) == 2
    assert capsys.readouterr().err == "modxfer: absent.yaml: no such file\n"


def test_errors_name_the_process_of_a_job(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["distill", "absent.yaml"]) == 2
    assert capsys.readouterr().err == "modxfer [rank 1]: absent.yaml: no such file\n"


def test_other_errors_say_where(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "collect", lambda: {}["absent"])
    assert main(["doctor"]) == 1
    err = capsys.readouterr().err
    assert "KeyError: 'absent'" in err
    assert "test_main.py" in err
    assert "Traceback" not in err


def test_debug_shows_tracebacks(monkeypatch):
    monkeypatch.setattr(doctor, "collect", lambda: {}["absent"])
    with pytest.raises(KeyError):
        main(["doctor", "--debug"])


def test_interrupt(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "collect", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "modxfer: interrupted\n"
