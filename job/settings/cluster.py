"""The workers that train together, as TF_CONFIG names them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

# The order in which TensorFlow numbers tasks: where there is a chief, it is the first of all.
_TRAINING_JOBS = ("chief", "worker")
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")


@dataclass(frozen=True)
class Cluster:
    """Two or more workers. addresses: ``host:port`` of each, the chief's first. index: which of them this one is."""

    addresses: tuple[str, ...]
    index: int

    @property
    def own(self) -> tuple[str, int]:
        """Return host and port of this worker, as the others know it."""
        return _host_and_port(self.addresses[self.index])

    @property
    def others(self) -> tuple[tuple[str, int], ...]:
        """Return host and port of all other workers."""
        return tuple(_host_and_port(each) for number, each in enumerate(self.addresses) if number != self.index)

    @property
    def peers(self) -> tuple[tuple[str, int], ...]:
        """Return host and port of those whose loss this worker has to notice: the chief sees to all, all to the chief.

        The end of the chief ends everyone, so every loss reaches every worker.
        """
        return self.others if self.index == 0 else self.others[:1]


def parse(text: str) -> Cluster | None:
    """Return the cluster of a TF_CONFIG; None where it names no other task than this one.

    Keys that platforms add (``environment``, ``job``) mean nothing here. Source of the format: TensorFlow,
    ``tf.distribute.cluster_resolver.TFConfigClusterResolver``.

    Raises:
        ValueError: it is malformed; the message goes on after "TF_CONFIG: ".
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is not valid JSON") from None
    if not isinstance(config, dict):
        raise ValueError("it is not a JSON object")
    jobs = config.get("cluster") or {}
    if not isinstance(jobs, dict) or not all(isinstance(tasks, list) for tasks in jobs.values()):
        raise ValueError("its cluster is not an object of lists of addresses")
    if idle := sorted(name for name, tasks in jobs.items() if tasks and name not in _TRAINING_JOBS):
        raise ValueError(
            f"its cluster has tasks of type {idle[0][:60]!r}, which this job has no work for; accepted are one "
            "chief and any number of workers, which all train"
        )
    addresses = _addresses(jobs)
    if not addresses:
        _check_alone(config)
        return None
    index = _index(config.get("task"), jobs)
    return Cluster(addresses, index) if len(addresses) > 1 else None


def _addresses(jobs: dict[str, list[Any]]) -> tuple[str, ...]:
    if len(jobs.get("chief", ())) > 1:
        raise ValueError(f"its cluster has {len(jobs['chief'])} chiefs; accepted is one")
    addresses = [address for name in _TRAINING_JOBS for address in jobs.get(name, ())]
    places = set()
    for address in addresses:
        found = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
        if found is None or not 0 < int(found[2]) < 65536:
            raise ValueError(f"its cluster has an address that is not host:port ({str(address)[:60]!r})")
        place = (found[1].lower(), int(found[2]))
        if place in places:
            raise ValueError(
                f"its cluster names an address twice ({address[:60]!r}); each process has one of its own, the chief too"
            )
        places.add(place)
    return tuple(addresses)


def _check_alone(config: dict[str, Any]) -> None:
    """Check that nothing in a TF_CONFIG without addresses says that there are other workers."""
    for name, value in config.items():
        if isinstance(value, dict) and any(value.get(job) for job in _TRAINING_JOBS):
            raise ValueError(f"it has no cluster, but {name[:60]!r}, which looks like one")
    task = config.get("task")
    if isinstance(task, dict) and str(task.get("index", 0)) != "0":
        raise ValueError(f"its task has the index {str(task['index'])[:60]!r}, but it has no cluster of that many")


def _index(task: Any, jobs: dict[str, list[Any]]) -> int:
    if not isinstance(task, dict) or "type" not in task or "index" not in task:
        wanting = " and ".join(
            f"task.{key}" for key in ("type", "index") if not isinstance(task, dict) or key not in task
        )
        raise ValueError(
            f"it has a cluster, but no {wanting}: which of its workers this one is; give each its own, as in "
            '{"cluster": ..., "task": {"type": "worker", "index": 0}}'
        )
    kind, index = task["type"], task["index"]
    numbers = {name: len(jobs[name]) for name in _TRAINING_JOBS if jobs.get(name)}
    accepted = ", ".join(f"{name} 0" + (f" to {count - 1}" if count > 1 else "") for name, count in numbers.items())
    if kind not in _TRAINING_JOBS or not jobs.get(kind):
        raise ValueError(f"its task is of type {str(kind)[:60]!r}, of which its cluster has none; accepted: {accepted}")
    # templates fill numbers in as text; TensorFlow takes both
    number = int(index) if isinstance(index, str) and index.isdecimal() and len(index) < 10 else index
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(jobs[kind]):
        raise ValueError(
            f"its task has the index {str(index)[:60]!r}, but its cluster has {len(jobs[kind])} {kind} tasks; "
            f"accepted: {accepted}"
        )
    return number + (len(jobs.get("chief", ())) if kind == "worker" else 0)


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def image_of(cluster_spec: str) -> str | None:
    """Return the image that Vertex AI's CLUSTER_SPEC names, None where it names none.

    Source of the format: Vertex AI, "Distributed training", "Format of CLUSTER_SPEC".
    """
    try:
        name = json.loads(cluster_spec)["job"]["workerPoolSpecs"][0]["containerSpec"]["imageUri"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    return name if isinstance(name, str) else None
