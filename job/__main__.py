"""The command: verbs and exit codes."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable

from job import console as console_module
from job import settings as settings_module
from job.errors import ConfigError, JobError, Stopped

USAGE = """usage: python -m job [run | plan | verify URI | env]

  run         the whole comparison, then publish (the default)
  plan        every check that run makes before training; trains nothing
  verify URI  check a published run: manifest, sizes and checksums
  env         print every variable: name, type, default, meaning
"""

logger = logging.getLogger("job")


def main(arguments: list[str]) -> int:
    """Run one verb and return its exit code."""
    match arguments:
        case ["env"]:
            sys.stdout.write(settings_module.variables_markdown())
            return 0
        case [] | ["run"] | ["plan"]:
            return _guarded(lambda: _work(plan_only=arguments == ["plan"]))
        case ["verify", uri]:
            return _guarded(lambda: _verify(uri))
        case _:
            sys.stderr.write(USAGE)
            return ConfigError.exit_code


def _work(*, plan_only: bool) -> int:
    settings = settings_module.load()
    console = console_module.start(settings.runtime.log_format)
    settings_module.quiet_tensorflow()
    with console_module.quiet_standard_error():
        # imported here, since TensorFlow takes seconds that env and a settings error must not
        from job import planning, run, runtime

        machine = runtime.start(settings.runtime)
    logger.info("training on %s, %s", ", ".join(machine.devices), machine.precision)
    with runtime.heed_sigterm():
        if not plan_only:
            run.run(settings, machine, console)
            return 0
        with run.workspace(settings.runtime) as folder:
            found = planning.facts(planning.make(settings, machine, folder))
    if console.rich is None:
        sys.stdout.write(json.dumps(found) + "\n")
    else:
        console.table("plan", ("what", "found"), [(name, str(value)) for name, value in found.items()])
    return 0


def _verify(uri: str) -> int:
    from job import publishing

    problems = publishing.verify(uri)
    for problem in problems:
        logger.error("%s", problem)
    if not problems:
        logger.info("verified: %s", uri)
    return 1 if problems else 0


def _guarded(work: Callable[[], int]) -> int:
    console_module.start(settings_module.log_format())
    try:
        return work()
    except ConfigError as error:
        for problem in error.problems:
            logger.error("%s", problem, extra={"variable": problem.variable})
        return error.exit_code
    except (JobError, Stopped) as error:
        logger.error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        logger.error("interrupted: nothing has been published")
        return 143
    except Exception:
        logger.exception("unforeseen error; please report it with the lines above")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
