"""What the user has to correct is told by the name of the variable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from job.errors import ConfigError, Problem


def assert_told(problem: Problem | None, variable: str, *said: str) -> None:
    """Check that there is a problem, with this variable, and with a message that holds all of ``said``."""
    assert problem is not None
    assert problem.variable == variable
    for words in said:
        assert words in problem.message


@contextmanager
def refused(variable: str, *said: str) -> Iterator[pytest.ExceptionInfo[ConfigError]]:
    """Check that the block is refused for one variable, with a message that holds all of ``said``; yield the error."""
    with pytest.raises(ConfigError) as caught:
        yield caught
    (problem,) = caught.value.problems
    assert_told(problem, variable, *said)
