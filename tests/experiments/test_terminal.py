"""What commands do on terminals and in pipes, and how they end."""

import contextlib
import fcntl
import json
import os
import pty
import runpy
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import experiments
from experiments import report, run, sweep, terminal

ROOT = Path(experiments.__file__).parents[1]
QUICK = ["--train-size", "16", "--batch-size", "16", "--threads", "1"]
CODE = """
import sys, warnings
import tqdm, tyro
from experiments import terminal
def main():
    {}
    return 0
sys.exit(terminal.run(main, "interrupted"))
"""


def command(code):
    """Arguments of Python for a command that is this code: real ones take seconds to load PyTorch.
    They are run in the same way."""
    return "-c", CODE.format(code)


@pytest.mark.parametrize("script", [run, sweep, report])
def test_every_command_is_run_in_the_same_way(script, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(terminal, "run", lambda main, interrupted: main.__name__)
    with pytest.raises(SystemExit, match="main"):
        runpy.run_path(script.__file__, run_name="__main__")


@pytest.mark.parametrize(
    ("count", "told"), [(0, "0 runs"), (1, "1 run"), (2, "2 runs"), (1000, "1,000 runs")]
)
def test_an_amount_is_told_in_singular_or_plural(count, told):
    assert terminal.amount(count, "run") == told


def environment(**changes):
    return os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"} | changes


def start(*arguments, cwd=ROOT, **options):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    pipes.setdefault("env", environment())
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=cwd, text=True, **pipes)


# Pipes.


def without_reader(*arguments, cwd=ROOT):
    """The status of a command whose reader goes after a line, and its errors."""
    process = start(*arguments, cwd=cwd)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    return process.wait(timeout=120), errors


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_goes_is_no_error(lines):
    code = command(f"for _ in range({lines}): print('a line')")
    assert without_reader(*code) == (0, "")


def test_a_run_without_reader_trains_to_its_end(tmp_path):
    assert without_reader(run.__file__, *QUICK, "--epochs", "2", cwd=tmp_path) == (0, "")
    (result,) = tmp_path.glob("runs/*/result.json")
    assert json.loads(result.read_text())["epochs_trained"] == 2


def test_a_command_without_any_output_comes_to_its_end(tmp_path):
    code = command(f"print('a line'); open({str(tmp_path / 'end')!r}, 'w')")
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, *code]
    assert subprocess.run(closed, env=environment(), timeout=60).returncode == 0
    assert (tmp_path / "end").exists()


# Terminals.


class Terminal:
    """One on which a command is running."""

    def __init__(self, *arguments, cwd=ROOT, **changes):
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        pipes = {"stdout": theirs, "stderr": theirs, "env": environment(**changes)}
        self._process = start(*arguments, cwd=cwd, **pipes)
        os.close(theirs)
        self._written = b""

    def read(self, until=None):
        """What was written, to the end or until there is a text."""
        while until is None or until not in self._written.decode(errors="replace"):
            try:
                part = os.read(self._ours, 1 << 16)
            except OSError:  # how a terminal says that it is at its end
                break
            if not part:
                break
            self._written += part
        return self._written.decode(errors="replace")

    def end(self, sent=None):
        """The status, and all that was written."""
        if sent:
            self._process.send_signal(sent)
        written = self.read()
        os.close(self._ours)
        return self._process.wait(timeout=60), written


ESCAPE = "\x1b"
HELP = command("tyro.cli(dict, default={'x': 1}, args=['--help'])")


def test_help_has_colours_on_a_terminal_only():
    assert ESCAPE in Terminal(*HELP).end()[1]
    assert ESCAPE not in "".join(start(*HELP).communicate(timeout=60))


@pytest.mark.parametrize("without", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_help_has_no_colours_where_they_are_not_wanted(without):
    status, written = Terminal(*HELP, **without).end()
    assert (status, "--x" in written, ESCAPE in written) == (0, True, False)


def test_a_run_that_is_ended_goes_on_and_draws_bars_where_a_terminal_can(tmp_path):
    long = [run.__file__, *QUICK, "--epochs", "500"]
    dumb = Terminal(*long, cwd=tmp_path, TERM="dumb")
    dumb.read(until="\nepoch   2/500  loss ")
    status, written = dumb.end(signal.SIGTERM)
    assert status == -signal.SIGTERM  # 143 in a shell
    assert "\r" not in written.replace("\r\n", "\n")
    able = Terminal(*long, cwd=tmp_path, NO_COLOR="1")
    assert able.read(until="goes on after epoch ")
    able.read(until="/500: ")
    status, written = able.end(signal.SIGINT)
    assert status == 130
    assert "\repoch " in written
    assert ESCAPE not in written.replace(f"{ESCAPE}[A", "")
    assert "interrupted; the same command goes on" in written


# Warnings.


def ended(code, *flags, **changes):
    """Of a command that is this code: status, output, errors."""
    process = start(*flags, *command(code), env=environment(**changes))
    return process.wait(timeout=60), *process.communicate()


def test_a_warning_is_one_line_for_users():
    warn = "warnings.warn('odd'); warnings.warn('old', RuntimeWarning)"
    assert ended(warn) == (0, "", "warning: odd\n<string>:6: RuntimeWarning: old\n")


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
