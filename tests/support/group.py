"""Several processes of the job that train together on loopback, and one process with several devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.support.running import ROOT, Finished
from tests.support.servers import free_port

# TensorFlow divides the CPU only before anything else is asked of it.
_DIVIDED = """
import sys
import tensorflow as tf
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * {devices})
from job import __main__
from job import stopping
stopping.heed()
stopping.leave(__main__.main(sys.argv[1:]))
"""


@dataclass
class Worker:
    """One of the processes, whose log lines are read as they come."""

    process: subprocess.Popen[str]
    lines: list[dict[str, Any]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._told = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._told:
                self.text.append(line)
                if line.startswith("{"):
                    self.lines.append(json.loads(line))
                self._told.notify_all()
        with self._told:
            self._told.notify_all()

    def wait_for(self, says: str, times: int = 1, seconds: float = 300) -> None:
        """Wait until ``times`` log lines hold ``says``."""

        def told() -> bool:
            return sum(says in line["message"] for line in self.lines) >= times or self.process.poll() is not None

        with self._told:
            assert self._told.wait_for(told, seconds), "".join(self.text)
        assert sum(says in line["message"] for line in self.lines) >= times, "".join(self.text)

    def finished(self, seconds: float = 400) -> Finished:
        """Wait for the end of the process."""
        code = self.process.wait(seconds)
        self._reader.join(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return Finished(code, self.lines, "".join(self.text))


def tf_config(ports: list[int], index: int, *, chief: bool = False) -> str:
    """Return the TF_CONFIG of a worker; the first is called chief where asked."""
    addresses = [f"127.0.0.1:{port}" for port in ports]
    if not chief:
        return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})
    cluster = {"chief": addresses[:1], "worker": addresses[1:]}
    task = {"type": "worker", "index": index - 1} if index else {"type": "chief", "index": 0}
    return json.dumps({"cluster": cluster, "task": task})


@contextmanager
def group(*environments: Mapping[str, str], chief: bool = False) -> Iterator[list[Worker]]:
    """Start one process for each environment, as workers that train together; end those that are left."""
    ports = [free_port() for _ in environments]
    workers = []
    try:
        for index, environment in enumerate(environments):
            workers.append(start(dict(environment) | {"TF_CONFIG": tf_config(ports, index, chief=chief)}))
        yield workers
    finally:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.kill()
            worker.finished()


def start(environment: Mapping[str, str], *arguments: str, devices: int = 1) -> Worker:
    """Start the job, with the CPU divided into ``devices``."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("TRANSFER_", "AIP_", "TF_CONFIG"))
    }
    command = ["-m", "job"] if devices == 1 else ["-c", _DIVIDED.format(devices=devices)]
    process = subprocess.Popen(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        env=kept | {"PYTHONPATH": str(ROOT)} | dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Worker(process)
