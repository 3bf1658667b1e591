"""Several processes of the job that train together on loopback, and one process with several devices."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from tests.support.kills import Running
from tests.support.running import ROOT, environment_of
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


def tf_config(ports: list[int], index: int, *, chief: bool = False) -> str:
    """Return the TF_CONFIG of a worker; the first is called chief where asked."""
    addresses = [f"127.0.0.1:{port}" for port in ports]
    if not chief:
        return json.dumps({"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}})
    cluster = {"chief": addresses[:1], "worker": addresses[1:]}
    task = {"type": "worker", "index": index - 1} if index else {"type": "chief", "index": 0}
    return json.dumps({"cluster": cluster, "task": task})


@contextmanager
def group(
    *environments: Mapping[str, str], chief: bool = False, missing: Sequence[int] = ()
) -> Iterator[list[Running]]:
    """Start one process for each environment, as workers that train together; end those that are left.

    missing: indices of those that are not started.
    """
    ports = [free_port() for _ in environments]
    workers = []
    try:
        for index, environment in enumerate(environments):
            if index not in missing:
                workers.append(start(dict(environment) | {"TF_CONFIG": tf_config(ports, index, chief=chief)}))
        yield workers
    finally:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.kill()
            worker.end()


def start(environment: Mapping[str, str], *arguments: str, devices: int = 1) -> Running:
    """Start the job, with the CPU divided into ``devices``."""
    command = ["-m", "job"] if devices == 1 else ["-c", _DIVIDED.format(devices=devices)]
    process = subprocess.Popen(
        [sys.executable, *command, *arguments],
        cwd=ROOT,
        env=environment_of(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Running(process)
