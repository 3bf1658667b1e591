"""The command: verbs and exit codes."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from job import stopping
from job.errors import ConfigError, JobError, Stopped

USAGE = """usage: python -m job [run | plan | verify URI | env]

  run         the whole comparison, then publish (the default)
  plan        every check that run makes before training, and what it would cost; trains nothing
  verify URI  check a published run: manifest, sizes and checksums
  env         print every variable: name, type, default, meaning
"""

logger = logging.getLogger("job")

# Modules are imported where they are needed: a signal is heeded from the first moment on, and TensorFlow takes seconds
# that env, verify and a settings error must not.


def main(arguments: list[str]) -> int:
    """Run one verb and return its exit code."""
    match arguments:
        case ["env"]:
            return _guarded(_env)
        case [] | ["run"] | ["plan"]:
            return _guarded(lambda: _work(plan_only=arguments == ["plan"]))
        case ["verify", uri]:
            return _guarded(lambda: _verify(uri))
        case _:
            sys.stderr.write(USAGE)
            return ConfigError.exit_code


def _env() -> int:
    from job.settings import environment

    sys.stdout.write(environment.variables_markdown())
    return 0


def _work(*, plan_only: bool) -> int:
    began = time.monotonic()
    from job.machine import console, limits, standard_error
    from job.settings import environment

    _log(environment.log_format())
    chosen = environment.load()
    limits.require_memory()
    screen = console.start(chosen.runtime.log_format)
    environment.prepare_tensorflow()
    environment.bound_threads(limits.cpus())
    with standard_error.held_back():
        from job.experiment import run
        from job.machine import runtime

        # what plan measures, one worker measures for itself
        machine = runtime.start(chosen.runtime, chosen.platform, alone=plan_only)
    with machine.replicas.ending_alike():
        logger.info("training on %s, %s", ", ".join(machine.devices), machine.arithmetic)
        if plan_only:
            run.plan(chosen, machine, screen)
        else:
            run.run(chosen, machine, screen, began)
    return 0


def _verify(uri: str) -> int:
    from job.settings import environment
    from job.storage import verification

    _log(environment.log_format())
    problems = verification.verify(uri)
    for problem in problems:
        logger.error("%s", problem)
    if not problems:
        logger.info("verified: %s", uri)
    return 1 if problems else 0


def _log(log_format: str) -> None:
    from job.machine import console

    console.start(log_format)


def _guarded(work: Callable[[], int]) -> int:
    try:
        return work()
    except ConfigError as error:
        for problem in error.problems:
            logger.error("%s", problem, extra={"variable": problem.variable})
        return error.exit_code
    except (JobError, Stopped) as error:
        logger.error("%s", error)
        return error.exit_code
    except Exception:
        if stopping.asked_to_stop():  # native code that calls Python makes other errors of Stopped
            logger.warning("asked to stop, and ended by an error on the way", exc_info=True)
            return Stopped.exit_code
        logger.exception("unforeseen error; please report it with the lines above")
        return 1


if __name__ == "__main__":
    try:
        stopping.heed()
        code = main(sys.argv[1:])
    except Stopped as stop:  # before or after all that main guards
        sys.stderr.write(f"{stop}\n")
        code = stop.exit_code
    stopping.leave(code)
