"""Exceptions that carry the exit code of the public contract.

Whoever raises knows whether a retry can help; ``__main__`` only passes the code on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user gave.

    variable: the environment variable to change, e.g. ``TRANSFER_DATASET``.
    message: what was received, what is accepted and what to do, as one sentence or two.
    """

    variable: str
    message: str

    def __str__(self) -> str:
        return f"{self.variable}: {self.message}"


class JobError(Exception):
    """Base of all errors that the job foresees."""

    exit_code = 1


class ConfigError(JobError):
    """Settings, data set, split, weights or credentials are wrong: a retry cannot help (exit 78)."""

    exit_code = 78

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))

    @classmethod
    def of(cls, variable: str, message: str) -> ConfigError:
        """Return the error for a single problem."""
        return cls([Problem(variable, message)])


class UnavailableError(JobError):
    """Storage or data stayed unreachable after retries: try again later (exit 74)."""

    exit_code = 74


class Stopped(BaseException):
    """The process was asked to stop (exit 143).

    Not an Exception, like KeyboardInterrupt: Keras catches every Exception while it traces a layer.
    """

    exit_code = 143


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something, and the error's type.

    TFDS appends lists of all its data sets, TensorFlow the stack of the graph.
    """
    lines = (line.strip() for line in str(getattr(error, "message", error)).splitlines())
    said = next((line for line in lines if line), None)
    return f"{said} ({type(error).__name__})" if said else type(error).__name__
