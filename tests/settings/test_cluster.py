"""TF_CONFIG, as the platforms write it and as people get it wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest

from job.settings.cluster import Cluster, image_of, parse

WORKERS = {"worker": ["a.pool:2222", "b.pool:2222", "[::1]:80"]}
CHIEF = {"chief": ["a:1"], "worker": ["b:1", "c:1"]}


def config(cluster: Any, kind: Any = "worker", index: Any = 0) -> str:
    return json.dumps({"cluster": cluster, "task": {"type": kind, "index": index}})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (config(WORKERS, index=2), Cluster(("a.pool:2222", "b.pool:2222", "[::1]:80"), 2)),
        (config(WORKERS, index="1"), Cluster(("a.pool:2222", "b.pool:2222", "[::1]:80"), 1)),
        (config(CHIEF, "chief"), Cluster(("a:1", "b:1", "c:1"), 0)),
        (config(CHIEF, "worker", 0), Cluster(("a:1", "b:1", "c:1"), 1)),
        (config(CHIEF, "worker", 1), Cluster(("a:1", "b:1", "c:1"), 2)),
        # Vertex AI adds keys of its own, and gives a single replica a cluster of one
        (
            '{"environment": "cloud", "job": {}, "cluster": {"chief": ["a:1"]}, "task": {"type": "chief", "index": 0}}',
            None,
        ),
        ('{"environment": "cloud", "cluster": {}, "job": {"args": ["a:1"]}, "task": {}}', None),
        (config({"worker": ["a:1"]}), None),
        (config({"worker": ["a:1"], "ps": []}), None),
        (config({}), None),
        ('{"cluster": {}}', None),
        ('{"environment": "cloud"}', None),
        ("{}", None),
    ],
)
def test_the_workers_are_numbered_chief_first(text: str, expected: Cluster | None) -> None:
    assert parse(text) == expected


def test_the_chief_looks_after_all_and_all_after_the_chief() -> None:
    assert parse(config(WORKERS)).peers == (("b.pool", 2222), ("::1", 80))  # type: ignore[union-attr]
    assert parse(config(WORKERS, index=2)).peers == (("a.pool", 2222),)  # type: ignore[union-attr]


def test_each_knows_itself_from_all_others() -> None:
    second = parse(config(WORKERS, index=1))
    assert second is not None
    assert second.own == ("b.pool", 2222)
    assert second.others == (("a.pool", 2222), ("::1", 80))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        (config(["a:1", "b:1"]), "lists of addresses"),
        (config({"worker": "a:1,b:1"}), "lists of addresses"),
        (config({"worker": ["a:1", "b"]}), "not host:port ('b')"),
        (config({"worker": ["a:1", "b:70000"]}), "not host:port"),
        (config({"worker": ["a:1", ""]}), "not host:port"),
        (config({"worker": ["a:1", 2]}), "not host:port"),
        (config({"worker": ["a:1", "a:1"]}), "'a:1'"),
        (config({"worker": ["a:1", "b:1", "A:01"]}), "twice ('A:01')"),
        (config({"chief": ["a:1"], "worker": ["a:1", "b:1"]}), "the chief too"),
        (config({"chief": ["a:1", "b:1"]}, "chief"), "2 chiefs"),
        (config(CHIEF | {"ps": ["d:1"]}), "'ps'"),
        (config(CHIEF | {"evaluator": ["d:1"]}, "evaluator"), "'evaluator'"),
        (config(CHIEF, "evaluator"), "'evaluator', of which its cluster has none; accepted: chief 0, worker 0 to 1"),
        (config(CHIEF, ["worker"]), "of which its cluster has none"),
        (json.dumps({"cluster": CHIEF}), "no task.type and task.index"),
        (json.dumps({"cluster": CHIEF, "task": {}}), "no task.type and task.index"),
        (json.dumps({"cluster": CHIEF, "task": {"type": "worker"}}), "no task.index:"),
        (json.dumps({"cluster": CHIEF, "task": {"index": 0}}), "no task.type:"),
        # a cluster of one says no less who it is
        (json.dumps({"cluster": {"worker": ["a:1"]}}), "no task.type and task.index"),
        (config({"chief": ["a:1"]}), "accepted: chief 0"),
        (config({"chief": ["a:1"]}, "chief", 1), "index '1'"),
        (json.dumps({"task": {"type": "worker", "index": 1}}), "no cluster of that many"),
        (json.dumps({"sparseCluster": WORKERS, "task": {"type": "worker", "index": 0}}), "'sparseCluster'"),
        (json.dumps({"clutser": CHIEF, "task": {"type": "chief", "index": 0}}), "'clutser'"),
        (config(WORKERS, "chief"), "of type 'chief'"),
        (config(WORKERS, index=3), "index '3', but its cluster has 3 worker tasks; accepted: worker 0 to 2"),
        (config(WORKERS, index=-1), "index '-1'"),
        (config(WORKERS, index="9" * 5000), "index '9"),
        (config(WORKERS, index="$(WORKER_INDEX)"), "WORKER_INDEX"),
        (config(WORKERS, index=True), "index 'True'"),
        (config(WORKERS, index=0.0), "index '0.0'"),
    ],
)
def test_a_malformed_one_is_refused_with_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=r"^(its|it is|it has) ") as error:
        parse(text)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("cluster_spec", "image"),
    [
        ('{"job": {"workerPoolSpecs": [{"containerSpec": {"imageUri": "job@sha256:ab"}}]}}', "job@sha256:ab"),
        ("{}", None),
        ("", None),
        ("{", None),
        ('{"job": []}', None),
        ('{"job": {"workerPoolSpecs": []}}', None),
        ('{"job": {"workerPoolSpecs": [{"pythonPackageSpec": {}}]}}', None),
        ("[" * 100_000, None),
    ],
)
def test_vertex_ais_specification_names_the_image(cluster_spec: str, image: str | None) -> None:
    assert image_of(cluster_spec) == image
