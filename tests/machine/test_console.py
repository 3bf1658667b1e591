from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import termios
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.running import ROOT

ESCAPE = "\x1b"
COLUMNS = ["arm", "train", "trainable", "test accuracy", "95% interval", "test loss", "seconds", "images/s", "cost"]
ROW = ["fine_tune", "123,456", "1,862,337", "0.9876", "0.981 - 0.993", "0.0412", "12,345", "10,123", "123.4567"]


def environment(**variables: str) -> dict[str, str]:
    """Return ours without what tells programs about colours and sizes: the tests decide about those."""
    about_terminals = re.compile(r"(FORCE_COLOR|NO_COLOR|COLORTERM|COLUMNS|LINES|TERM|TTY_.*|PYTHON(?!PATH$).*)")
    kept = {name: value for name, value in os.environ.items() if not about_terminals.fullmatch(name)}
    return {**kept, "TERM": "xterm-256color", **variables}


def piped(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python code whose outputs are pipes."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )


def on_terminal(code: str, columns: int = 120) -> str:
    """Run Python code whose standard output is a terminal, and return all that the terminal received."""
    ours, theirs = pty.openpty()
    try:
        termios.tcsetwinsize(theirs, (40, columns))
        with subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=theirs,
            stderr=subprocess.PIPE,
        ) as process:
            os.close(theirs)
            received = b""
            while True:
                try:
                    received += os.read(ours, 65536)
                except OSError:  # how Linux says that the other side is closed
                    break
            assert process.stderr is not None
            errors = process.stderr.read().decode()
        assert (process.returncode, errors) == (0, "")
    finally:
        os.close(ours)
    return received.decode()


def lines_of(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    """Return the JSON lines of a process that ended well."""
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("\n")
    return [json.loads(line) for line in result.stdout[:-1].split("\n")]


def without_escapes(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


START = """
import logging, sys, time, warnings
from job.machine.console import start
logger = logging.getLogger("job.somewhere")
"""
TABLE = f"""
console.table("a title", {COLUMNS}, [{ROW}, {ROW}])
"""


# --- JSON lines --------------------------------------------------------------------------------------------------


def test_a_json_line_has_severity_message_time_and_the_extra_fields() -> None:
    before = datetime.now(UTC)
    code = 'start("json")\nlogger.info("epoch %d", 3, extra={"arm": "frozen", "epoch": 3, "loss": 0.25, "path": None})'
    (line,) = lines_of(piped(START + code))
    time = line.pop("time")
    assert line == {
        "severity": "INFO",
        "message": "epoch 3",
        "arm": "frozen",
        "epoch": 3,
        "loss": 0.25,
        "path": None,
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert before - timedelta(milliseconds=1) <= datetime.fromisoformat(time) <= datetime.now(UTC)


def test_every_record_is_one_line_whatever_it_says() -> None:
    messages = ["two\nlines", 'quotes " and \\', "\r\ttabs", "Käfer 犬", "[red]no markup[/x] :dog:", "50% done %s", ""]
    found = lines_of(piped(f'{START}start("json")\nfor message in {messages!r}: logger.warning(message)'))
    assert [line["message"] for line in found] == messages
    assert {line["severity"] for line in found} == {"WARNING"}


def test_an_exception_is_one_line_with_its_traceback() -> None:
    code = """
start("json")
try:
    raise ValueError("what went\\nwrong")
except ValueError:
    logger.exception("unforeseen")
"""
    (line,) = lines_of(piped(START + code))
    assert line["severity"] == "ERROR"
    assert line["message"].startswith("unforeseen\nTraceback (most recent call last):\n")
    assert line["message"].endswith("\nValueError: what went\nwrong")
    assert set(line) == {"severity", "message", "time"}


def test_a_value_without_json_form_is_shown_as_text() -> None:
    code = 'import pathlib\nstart("json")\nlogger.info("x", extra={"path": pathlib.PurePosixPath("a/b")})'
    (line,) = lines_of(piped(START + code))
    assert line["path"] == "a/b"


def test_of_other_libraries_only_warnings_are_logged() -> None:
    code = """
start("json")
logger.debug("ours, debug")
logger.info("ours, info")
for name in ("library", "absl", "tensorflow"):
    for level in ("info", "warning", "error"):
        getattr(logging.getLogger(name), level)("%s, %s", name, level)
warnings.warn("old", UserWarning)
"""
    messages = [line["message"] for line in lines_of(piped(START + code))]
    assert messages[:-1] == ["ours, info", "library, warning", "library, error", "absl, error", "tensorflow, error"]
    assert "UserWarning: old" in messages[-1]


def test_starting_again_replaces_the_first_start() -> None:
    (line,) = lines_of(piped(START + 'start("text")\nstart("json")\nlogger.info("once")'))
    assert line["message"] == "once"


def test_a_table_is_a_json_line_for_each_row() -> None:
    first, second = lines_of(piped(f'{START}console = start("json"){TABLE}'))
    assert first["row"] == second["row"] == dict(zip(COLUMNS, ROW, strict=True))
    assert first["message"] == "a title: " + ", ".join(ROW)


def test_a_bar_writes_nothing_among_json_lines() -> None:
    code = 'with start("json").bar("frozen", 10) as advance:\n    advance(5)\n    logger.info("inside")'
    assert [line["message"] for line in lines_of(piped(START + code))] == ["inside"]


# --- text through a pipe -----------------------------------------------------------------------------------------


def text_of(code: str) -> str:
    result = piped(START + code)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def test_text_through_a_pipe_has_no_escape_codes() -> None:
    code = f"""
console = start("text")
logger.info("epoch 1: loss 0.25")
logger.error("wrong")
with console.bar("frozen", 10) as advance:
    advance(10)
{TABLE}"""
    text = text_of(code)
    assert ESCAPE not in text
    assert "\r" not in text
    first, second, *_ = text.splitlines()
    assert re.fullmatch(r"\d\d:\d\d:\d\d epoch 1: loss 0\.25", first)
    assert re.fullmatch(r"\d\d:\d\d:\d\d wrong", second)
    assert "images/s" not in text.split("a title")[0]


@pytest.mark.parametrize("count", [8, 9])
def test_a_wide_table_is_neither_folded_nor_cut_in_a_pipe(count: int) -> None:
    columns, row = COLUMNS[:count], ROW[:count]
    text = text_of(f'start("text").table("a title", {columns}, [{row}, {row}])')
    title, *rest = [line.rstrip() for line in text.splitlines() if line.strip()]
    header, rule, *rows = rest
    assert title == "a title"
    assert re.split(r"\s{2,}", header.strip()) == columns
    assert set(rule.strip()) == {"─"}
    assert [re.split(r"\s{2,}", line.strip()) for line in rows] == [row, row]
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text


def test_a_long_message_is_not_wrapped() -> None:
    message = "word " * 100 + "end"
    (line,) = text_of(f'start("text")\nlogger.info({message!r})').splitlines()
    assert line[len("12:34:56 ") :] == message


def test_text_is_shown_as_it_is() -> None:
    cells = ["weights[v2].h5", "x[/y]", "[red]no colour[/red]", ":100: :dog:"]
    code = f"""
console = start("text")
for cell in {cells}:
    logger.info(cell)
console.table(":100: [b]title", ["[b]what", "found"], [(cell, "1") for cell in {cells}])
"""
    lines = [line.strip() for line in text_of(code).splitlines()]
    assert [line[len("12:34:56 ") :] for line in lines[:4]] == cells
    assert lines[4] == ":100: [b]title"
    assert "[b]what" in "".join(lines)
    assert [line.removesuffix("1").strip() for line in lines if line.endswith("1")] == cells


def test_an_exception_is_shown_with_its_traceback() -> None:
    text = text_of('start("text")\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n    logger.exception("unforeseen")')
    assert "unforeseen\nTraceback (most recent call last):\n" in text
    assert text.endswith("\nZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_librarys_faulty_log_call_ends_no_run(log_format: str) -> None:
    code = f"""
start("{log_format}")
logging.getLogger("library").warning("%d images", "many")
logger.info("still here")
"""
    result = piped(START + code)
    assert result.returncode == 0
    assert "still here" in result.stdout
    assert "--- Logging error ---" in result.stderr


# --- the choice between them -------------------------------------------------------------------------------------


def test_auto_is_json_in_a_pipe() -> None:
    (line,) = lines_of(piped(START + 'start("auto")\nlogger.info("hello")'))
    assert line["message"] == "hello"


def test_auto_is_text_on_a_terminal() -> None:
    received = on_terminal(START + 'start("auto")\nlogger.info("hello")')
    assert re.fullmatch(r"\d\d:\d\d:\d\d hello", without_escapes(received).strip())


def test_json_on_a_terminal_is_json_without_bar() -> None:
    code = 'with start("json").bar("frozen", 10) as advance:\n    advance(5)\n    logger.info("inside")'
    received = on_terminal(START + code)
    assert json.loads(received)["message"] == "inside"
    assert ESCAPE not in received


# --- a terminal --------------------------------------------------------------------------------------------------


def test_a_terminal_shows_warnings_in_colour() -> None:
    received = on_terminal(START + 'start("text")\nlogger.info("plain")\nlogger.warning("coloured")')
    plain, coloured = received.splitlines()
    assert ESCAPE not in plain
    assert ESCAPE in coloured


def test_the_bar_on_a_terminal_shows_name_count_rate_and_time_left() -> None:
    code = """
with start("auto").bar("frozen", 1000) as advance:
    for _ in range(5):
        time.sleep(0.02)
        advance(100)
    logger.info("in the middle")
logger.info("after")
"""
    received = on_terminal(START + code)
    shown = without_escapes(received)
    drawn = re.findall(r"frozen +[━╸╺ ]+ +(\d+)/1000 +([\d-]+) images/s +(\S+)", shown)
    assert drawn, shown
    count, rate, left = drawn[-1]
    assert count == "500"
    assert int(rate) > 0
    assert re.fullmatch(r"\d+:\d\d:\d\d", left)
    # a message takes the line of the bar, which is drawn again below it; in the end the bar is erased
    assert re.search(rf"\r{ESCAPE}\[2K\d\d:\d\d:\d\d in the middle\r\nfrozen ", received)
    assert re.search(rf"{ESCAPE}\[1A{ESCAPE}\[2K\d\d:\d\d:\d\d after\r\n$", received)


def test_a_bar_that_has_not_moved_shows_no_rate() -> None:
    shown = without_escapes(on_terminal(START + 'with start("auto").bar("frozen", 10):\n    pass'))
    assert re.search(r" 0/10 +- images/s +-:--:--", shown)


def test_the_bar_fits_a_narrow_terminal() -> None:
    code = 'with start("auto").bar("frozen", 100) as advance:\n    advance(1)\n    time.sleep(0.02)\n    advance(1)'
    shown = without_escapes(on_terminal(START + code, columns=80))
    assert re.search(r"2/100 +\d+ images/s", shown)
    assert max(len(line) for line in re.split(r"[\r\n]+", shown)) <= 80
