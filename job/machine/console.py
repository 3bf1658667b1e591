"""What a person or a log collector sees: text with progress bars on a terminal, JSON lines elsewhere."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TextIO

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

PIPE_WIDTH = 120

Advance = Callable[[int], None]


class JsonFormatter(logging.Formatter):
    """One JSON object a line, with the field names that Cloud Logging reads: severity, message, time."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record and its ``extra`` fields as one line of JSON."""
        message = record.getMessage()
        if record.exc_info:
            message = f"{message}\n{self.formatException(record.exc_info)}"
        fields = {name: value for name, value in vars(record).items() if name not in STANDARD_FIELDS}
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"severity": record.levelname, "message": message, "time": time, **fields}
        return json.dumps(line, ensure_ascii=False, default=str)


class _TextHandler(logging.Handler):
    """Prints above a live progress bar, and never wraps: a wrapped line cannot be searched or copied."""

    def __init__(self, console: RichConsole) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))

    def emit(self, record: logging.LogRecord) -> None:
        style = {"WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold red"}.get(record.levelname)
        try:
            self._console.print(self.format(record), style=style, soft_wrap=True, highlight=False)
        except Exception:  # a library's faulty log call is reported, as by every handler of logging, and ends no run
            self.handleError(record)


class _Rate(ProgressColumn):
    """Images per second, over the last half minute."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:6.0f} images/s" if task.speed else "     - images/s", style="cyan")


@dataclass(frozen=True)
class Console:
    """The job's outputs on standard output. ``rich`` is None where lines are JSON."""

    rich: RichConsole | None

    @contextmanager
    def bar(self, name: str, total: int) -> Iterator[Advance]:
        """Show a bar over ``total`` images while the block runs; call what it yields with the images just done."""
        if self.rich is None or not self.rich.is_terminal:
            yield lambda _: None
            return
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.rich, transient=True, expand=True) as progress:
            task = progress.add_task(name, total=total)
            yield lambda images: progress.advance(task, images)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table; as JSON, one line per row."""
        if self.rich is None:
            for row in rows:
                logging.getLogger(__name__).info(
                    "%s: %s", title, ", ".join(row), extra={"row": dict(zip(columns, row, strict=True))}
                )
            return
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        self.rich.print(table)


def start(log_format: str, stream: TextIO | None = None) -> Console:
    """Route all logging to ``stream`` (standard output) as ``log_format`` (auto, text, json) says."""
    out = stream or sys.stdout
    as_text = log_format == "text" or (log_format == "auto" and out.isatty())
    # a pipe has no width of its own: give it one at which no figure of a table is folded
    width = None if out.isatty() else PIPE_WIDTH
    # no markup: weights[v2].h5 would lose its brackets, [/x] raise an error, and :100: become a picture
    console = Console(RichConsole(file=out, width=width, markup=False, emoji=False) if as_text else None)
    handler: logging.Handler
    if console.rich is not None:
        handler = _TextHandler(console.rich)
    else:
        handler = logging.StreamHandler(out)
        handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("job").setLevel(logging.INFO)
    logging.captureWarnings(capture=True)
    # notices of TensorFlow's and TFDS's own deprecations, nothing that a user of the job could act on; and of each try
    # for credentials, of which the job tells itself
    for library in ("absl", "google.auth", "tensorflow", "urllib3"):
        logging.getLogger(library).setLevel(logging.ERROR)
    return console
