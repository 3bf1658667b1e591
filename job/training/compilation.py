"""Whether the steps of a phase are compiled by XLA: found out on the steps themselves, and only where it can pay."""

from __future__ import annotations

import logging
import math
from typing import Literal

import tensorflow as tf

from job.errors import first_line
from job.training.feeds import Call
from job.training.steps import Steps

logger = logging.getLogger(__name__)

# On an H200 (MobileNetV2 at 160 px, batches of 32) XLA took 57 s to compile a training step whose first plain call took
# 7 s, to trace it and choose kernels; 8 s for fine_tune's with 1 s, 2 s for a head's with a third: eight times as long.
# Steps were then 4.0, 3.5 and 10 times as fast. So it pays where plain steps go on for eleven times the first one.
_FIRST_CALLS_WORTH_IT = 12.0
# Of plain steps, before their time is believed.
_STEPS_TIMED = 20

Mode = Literal["off", "auto", "on"]


class Compilation:
    """Decides for the steps of one phase, through all results of an arm, and keeps their rates.

    A probe beside the training would have to guess at batch, backbone and kernels, and would cost what it measures. The
    training itself tells: it begins with plain steps; where those to come would take long enough, XLA compiles them,
    and whichever is faster goes on. Both take the same steps but for rounding.
    """

    def __init__(self, name: str, mode: Mode, further_steps: int = 0) -> None:
        """Take the phase's name for the log. further_steps: of the results that follow the one in hand."""
        self._name = name
        self._mode = mode
        self.further_steps = further_steps
        self._seconds = {False: 0.0, True: 0.0}
        self._steps = {False: 0, True: 0}
        self._images = {False: 0, True: 0}
        self._seen: set[tuple[bool, int]] = set()
        self._first_seconds = 0.0
        self._settled: bool | None = {"off": False, "on": True}.get(mode)
        self._trying = False

    @property
    def examples_per_second(self) -> float:
        """Return the examples a second of the steps that are taken now, but for calls that compile."""
        padded = self._steps[True] > 0 and self._settled is not False
        return self._images[padded] / self._seconds[padded] if self._steps[padded] else math.nan

    def padded(self, left: int) -> bool:
        """Return whether the next call, with ``left`` steps to come in the result, is one for XLA."""
        if self._settled is not None:
            return self._settled
        # asked for the next call while one is made ready, so before the first one has been compiled
        if self._trying:
            return True
        if self._steps[False] < _STEPS_TIMED:
            return False
        expected = (left + self.further_steps) * self._per_step(padded=False)
        if expected < _FIRST_CALLS_WORTH_IT * self._first_seconds:
            return False
        logger.info(
            "%s: steps of %.1f ms, for %.0f s more: XLA compiles them", self._name,
            1000 * self._per_step(padded=False), expected, extra={"seconds": expected},
        )  # fmt: skip
        self._trying = True
        return True

    def take(self, steps: Steps, call: Call, seed: int, done: int, votes: tuple[float, float]) -> tuple[float, float]:
        """Take the steps of ``call``; where XLA cannot compile them and nobody insists, they are taken without it."""
        try:
            return steps(call, seed, done, votes)
        except tf.errors.OpError as error:
            # a step that is compiled changes nothing before it has been: ptxas or memory may be lacking
            if not call.padded or self._mode == "on" or any(padded for padded, _ in self._seen):
                raise
            logger.warning(
                "%s: XLA cannot compile the steps, so they run without it: %s", self._name, first_line(error)
            )
            self._settled = False
            steps.leave_xla()
            return steps(call, seed, done, votes)

    def took(self, call: Call, seconds: float) -> bool:
        """Take note of the seconds of a call, and return whether they tell how long the next will take."""
        kind = call.padded
        shape = kind, int(call.feeds[0].order.shape[1])
        if shape not in self._seen:
            # the first one traces and compiles, and for each size of a batch a GPU chooses kernels: once that took 60 s
            if not self._seen:
                self._first_seconds = seconds
            self._seen.add(shape)
            return False
        self._seconds[kind] += seconds
        self._steps[kind] += call.steps
        self._images[kind] += call.images
        if kind and self._settled is None and self._steps[True] >= _STEPS_TIMED:
            plain, compiled = self._per_step(padded=False), self._per_step(padded=True)
            self._settled = compiled < plain
            logger.info(
                "%s: %.2f ms a step by XLA, %.2f ms without: %s", self._name, 1000 * compiled, 1000 * plain,
                "XLA is kept" if self._settled else "XLA is left", extra={"xla": self._settled},
            )  # fmt: skip
        return True

    def _per_step(self, *, padded: bool) -> float:
        return self._seconds[padded] / self._steps[padded]
