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
    def peers(self) -> tuple[tuple[str, int], ...]:
        """Return host and port of those whose loss this worker has to notice: the chief sees to all, all to the chief.

        The end of the chief ends everyone, so every loss reaches every worker.
        """
        watched = self.addresses[1:] if self.index == 0 else self.addresses[:1]
        parts = (address.rpartition(":") for address in watched)
        return tuple((host.strip("[]"), int(port)) for host, _, port in parts)


def parse(text: str) -> Cluster | None:
    """Return the cluster of a TF_CONFIG; None where it names no other task than this one.

    Source of the format: TensorFlow, ``tf.distribute.cluster_resolver.TFConfigClusterResolver``.

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
        raise ValueError(f"its cluster has {idle[0]!r} tasks, which this job has no work for: all its tasks train")
    addresses = [address for name in _TRAINING_JOBS for address in jobs.get(name, ())]
    for address in addresses:
        found = _ADDRESS.fullmatch(address) if isinstance(address, str) else None
        if found is None or not 0 < int(found[2]) < 65536:
            raise ValueError(f"its cluster has an address that is not host:port ({str(address)[:60]!r})")
    if len(set(addresses)) < len(addresses):
        raise ValueError("its cluster names an address twice")
    if len(jobs.get("chief", ())) > 1:
        raise ValueError(f"its cluster has {len(jobs['chief'])} chiefs")
    if len(addresses) < 2:
        return None
    return Cluster(tuple(addresses), _index(config.get("task"), jobs))


def _index(task: Any, jobs: dict[str, list[str]]) -> int:
    if not isinstance(task, dict) or "type" not in task or "index" not in task:
        raise ValueError("its task does not say which of the cluster's workers this one is (type and index)")
    kind, index = task["type"], task["index"]
    if kind not in _TRAINING_JOBS or not jobs.get(kind):
        raise ValueError(f"its task is of type {str(kind)[:60]!r}, of which its cluster has none")
    # templates fill numbers in as text; TensorFlow takes both
    number = int(index) if isinstance(index, str) and index.isdecimal() else index
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(jobs[kind]):
        raise ValueError(
            f"its task has the index {str(index)[:60]!r}, but its cluster has {len(jobs[kind])} {kind} tasks"
        )
    return number + (len(jobs.get("chief", ())) if kind == "worker" else 0)


def image_of(cluster_spec: str) -> str | None:
    """Return the image that Vertex AI's CLUSTER_SPEC names, None where it names none.

    Source of the format: Vertex AI, "Distributed training", "Format of CLUSTER_SPEC".
    """
    try:
        name = json.loads(cluster_spec)["job"]["workerPoolSpecs"][0]["containerSpec"]["imageUri"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    return name if isinstance(name, str) else None
