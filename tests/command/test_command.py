"""How a command ends, whatever happens to it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cupyattn
from cupyattn import command
from cupyattn.command import main, parser

ROOT = Path(cupyattn.__file__).parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="POSIX signals and pipes")
EXPLAIN = ["explain", "--seqlen-q", "8"]


@pytest.mark.parametrize("arguments", [["--version"], ["--help"]])
def test_version_and_help_end_with_status_zero(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(
        {"--version": f"cupyattn {cupyattn.__version__}\n"}.get(*arguments, "usage")
    )


def test_every_command_is_in_the_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n    {name} " in out for name in (*parser.COMMANDS, "info"))


def test_an_error_is_one_line_with_the_command_and_the_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["explain", "--seqlen-q", "0"])
    assert caught.value.code == 2
    sentence = "argument --seqlen-q: '0' is not a positive number; see cupyattn explain --help"
    assert capsys.readouterr().err == f"cupyattn explain: {sentence}\n"


def test_ctrl_c_is_status_130_and_a_word(monkeypatch, capsys):
    def pressed(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(parser, "run", pressed)
    assert main([]) == command.INTERRUPTED == 130
    assert capsys.readouterr().err == "\nStopped.\n"


MEASURE = """
import signal, sys
from cupyattn.command import main, parser
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts beside it has it ignored
print("ready", flush=True)
sys.exit(main(["bench", "--seqlen", "8", "--turns", "1000", "--against", "naive"]))
"""


@posix
def test_ctrl_c_while_it_measures_leaves_no_traceback():
    call = [sys.executable, "-c", MEASURE]
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    assert process.stdout.readline() == "ready\n"
    out = err = ""
    for _ in range(20):  # what is pressed within a callback of C is lost
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            out, err = process.communicate(timeout=5)
            break
    else:
        process.kill()
        process.communicate()
    assert (process.returncode, out, err.splitlines()[-1]) == (130, "", "Stopped.")
    assert "Traceback" not in err


@posix
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [EXPLAIN, ["--help"]], ids=lambda arguments: arguments[0])
def test_a_closed_pipe_is_status_141_and_no_word(arguments, unbuffered):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        call = [sys.executable, "-W", "error", "-m", "cupyattn", *arguments]
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        process = subprocess.Popen(call, stdout=closed, stderr=subprocess.PIPE, cwd=ROOT, text=True, env=environment)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("arguments", [["info"], ["explain", "--seqlen-q", "4"]], ids=lambda words: words[0])
def test_a_full_disk_behind_what_is_printed_is_status_1_and_a_sentence(arguments, unbuffered):
    with open("/dev/full", "w") as full:
        call = [sys.executable, "-W", "error", "-m", "cupyattn", *arguments]
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(call, stdout=full, stderr=subprocess.PIPE, cwd=ROOT, text=True, env=environment)
    assert done.returncode == 1
    assert re.fullmatch(r"cupyattn: .*No space left on device\n", done.stderr)


@pytest.mark.skipif(os.name != "posix", reason="needs a shell of POSIX")
@pytest.mark.parametrize(
    "arguments", [["info"], ["explain", "--seqlen-q", "4"], ["--help"]], ids=lambda words: words[0]
)
def test_a_closed_standard_output_is_no_error(arguments):
    call = ["sh", "-c", '"$0" "$@" >&-', sys.executable, "-m", "cupyattn", *arguments]
    done = subprocess.run(call, stderr=subprocess.PIPE, cwd=ROOT, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


def test_importing_the_package_does_not_import_the_command_line():
    code = "import sys, cupyattn; print(any(name.startswith('cupyattn.command') for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_verbose_lets_info_through(monkeypatch):
    import logging

    logger = logging.getLogger("cupyattn")
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    try:
        assert main(["-v", *EXPLAIN]) == 0
        assert logger.isEnabledFor(logging.INFO)
    finally:
        logger.setLevel(logging.NOTSET)
