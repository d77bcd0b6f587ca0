"""What commands do on terminals and in pipes, and how they end."""

import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

import experiments
from experiments import report, run, sweep, terminal
from tests.experiments.run_folders import write_classification

ROOT = Path(experiments.__file__).parents[1]
RUN, SWEEP, REPORT = (ROOT / "experiments" / f"{name}.py" for name in ("run", "sweep", "report"))
QUICK = ["--train-size", "16", "--batch-size", "16", "--epochs", "2", "--threads", "1"]


def environment(**changes):
    return os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"} | changes


def start(*arguments, cwd, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    pipes.setdefault("env", environment())
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, text=True, **pipes)


def without_reader(*arguments, cwd, lines=0):
    """The status of a command whose reader goes after some lines, and its errors."""
    process = start(*arguments, cwd=cwd)
    for _ in range(lines):
        process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    return process.wait(timeout=120), errors


@pytest.mark.parametrize("command", [(RUN, "--help"), (SWEEP, "figure2", "--dry-run")])
def test_a_reader_that_goes_is_no_error(command, tmp_path):
    assert without_reader(*command, cwd=tmp_path) == (0, "")


def test_a_report_without_reader_is_written(tmp_path):
    write_classification(tmp_path / "runs")
    assert without_reader(REPORT, "figures", cwd=tmp_path) == (0, "")
    assert (tmp_path / "runs" / "report" / "report.md").exists()


def test_a_run_without_reader_trains_to_its_end(tmp_path):
    assert without_reader(RUN, *QUICK, cwd=tmp_path, lines=1) == (0, "")
    (result,) = tmp_path.glob("runs/*/result.json")
    assert json.loads(result.read_text())["epochs_trained"] == 2


def test_a_run_without_any_output_trains_to_its_end(tmp_path):
    command = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, RUN, *QUICK]
    assert subprocess.run(command, cwd=tmp_path, env=environment()).returncode == 0
    assert list(tmp_path.glob("runs/*/result.json"))


def on_a_terminal(*arguments, cwd, **changes):
    """All that a command writes to a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = start(*arguments, cwd=cwd, stdout=theirs, stderr=theirs, env=environment(**changes))
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # how a terminal says that it is at its end
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait(timeout=60) == 0
    return written.decode()


ESCAPE = "\x1b"


def test_no_colour_means_no_escape_codes(tmp_path):
    assert ESCAPE not in on_a_terminal(SWEEP, "--help", cwd=tmp_path, NO_COLOR="1")


def test_help_has_colours_on_a_terminal_only(tmp_path):
    assert ESCAPE in on_a_terminal(SWEEP, "--help", cwd=tmp_path)
    assert ESCAPE not in on_a_terminal(SWEEP, "--help", cwd=tmp_path, TERM="dumb")
    output, errors = start(SWEEP, "--help", cwd=tmp_path).communicate(timeout=60)
    assert ESCAPE not in output + errors


def test_bars_are_for_terminals_that_can_write_a_line_anew(tmp_path):
    plain = on_a_terminal(RUN, *QUICK, "--out", "a", cwd=tmp_path, NO_COLOR="1")
    assert "\repoch 1/2: " in plain
    assert ESCAPE not in plain
    dumb = on_a_terminal(RUN, *QUICK, "--out", "b", cwd=tmp_path, TERM="dumb")
    assert "epoch 1/2: " not in dumb
    assert "\nepoch 1/2  loss " in dumb
    assert "\r" not in dumb.replace("\r\n", "\n")


# Warnings.


def ended(code, *flags, **changes):
    """Of a command that is this code: status, output, errors."""
    text = f"import sys, warnings\nfrom experiments import terminal\ndef main():\n    {code}\n"
    text += "    return 0\nsys.exit(terminal.run(main, 'interrupted'))"
    process = start(*flags, "-c", text, cwd=ROOT, env=environment(**changes))
    return process.wait(timeout=60), *process.communicate()


def test_a_warning_is_one_line_for_users():
    warn = "warnings.warn('odd'); warnings.warn('old', RuntimeWarning)"
    assert ended(warn) == (0, "", "warning: odd\n<string>:4: RuntimeWarning: old\n")


def test_pythons_filters_of_warnings_work():
    warn = "warnings.warn('odd')"
    assert ended(warn, "-W", "ignore") == (0, "", "")
    assert ended(warn, PYTHONWARNINGS="ignore") == (0, "", "")
    status, _, errors = ended(warn, "-W", "error")
    assert (status, errors.splitlines()[-1]) == (1, "UserWarning: odd")


# Errors and statuses.


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("--lr: wrong"), "--lr: wrong"),
        (ValueError("a\nb\x1b"), "a\\nb\\x1b"),
        (FileNotFoundError(2, "No such file or directory", "x"), "x: no such file or directory"),
        (OSError(28, "No space left on device"), "no space left on device"),
        (IsADirectoryError(21, "Is a directory", ".x.7", None, "x"), "x: is a directory"),
        (OSError("busy"), "busy"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_errors_are_told_without_numbers(error, told):
    assert terminal.told(error) == told


def test_interrupt_and_failure_have_their_statuses():
    assert ended("raise KeyboardInterrupt") == (130, "", "interrupted\n")
    assert terminal.fail(ValueError("--x: wrong")) == 2
    assert terminal.fail(ValueError("RUNS: wrong")) == 2
    assert terminal.fail(ValueError("bad")) == 1
    assert terminal.fail(ValueError("--x: bad"), 75) == 75


def test_a_run_that_is_terminated_goes_on(tmp_path):
    process = start(RUN, *QUICK, "--epochs", "1000", cwd=tmp_path)
    # Epochs twice is refused; this is a run of its own.
    assert process.wait(timeout=60) == 2
    long = [*QUICK[:-4], "--epochs", "500", "--threads", "1"]
    process = start(RUN, *long, cwd=tmp_path)
    next(line for line in process.stdout if line.startswith("epoch"))
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == -signal.SIGTERM  # 143 in a shell
    process = start(RUN, *long, cwd=tmp_path)
    assert process.stdout.readline().startswith("goes on after epoch ")
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130


STATUSES = {run: (1, 2, 75, 130, 143), sweep: (1, 2, 3, 130, 143), report: (1, 2, 130, 143)}


@pytest.mark.parametrize("command", STATUSES)
def test_help_names_every_status(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with contextlib.suppress(SystemExit):
        command.main()
    text = " ".join(capsys.readouterr().out.split())
    readme = (ROOT / "experiments" / "README.md").read_text()
    assert "Exit status: 0 " in text
    for status in STATUSES[command]:
        assert f"; {status} " in text
        assert f"\n| {status} | " in readme
