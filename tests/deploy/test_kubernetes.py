"""The manifests in deploy/kubernetes: built by kubectl, valid, and right in what schemas let pass."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from job.errors import ConfigError, Stopped, UnavailableError
from job.machine.console import JsonFormatter
from job.settings.environment import load
from job.stopping import GRACE_SECONDS
from tests.deploy.test_env_files import kustomized, secrets_in
from tests.support.running import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
OVERLAYS = sorted(path.parent.name for path in (FOLDER / "overlays").glob("*/kustomization.yaml"))
# Components in the order in which the README says that they go together.
TOGETHER = ("gke-spot+multi-gpu", "gke-spot+multi-gpu+multi-worker+queued", "cpu+queued")
ALL = ("base", *OVERLAYS, *TOGETHER)
# The oldest that the README names, and the newest whose schemas the package carries.
VERSIONS = ("1.29", kubernetes_validate.latest_version())
IMAGE = "transfer-learning-job"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
# What a killed process leaves, and what the kernel does to one that takes too much memory.
UNFORESEEN, KILLED = 1, 137

Object = dict[str, Any]
Problems = Iterator[str]


@dataclass
class Rendered:
    """What kubectl makes of a folder."""

    objects: list[Object]

    def of(self, kind: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] == kind]

    def named(self, kind: str, name: str) -> Object:
        return next(each for each in self.of(kind) if each["metadata"]["name"] == name)

    @property
    def workload(self) -> Object:
        (found,) = self.of("Job") + self.of("JobSet")
        return found

    @property
    def is_set(self) -> bool:
        return bool(self.workload["kind"] == "JobSet")

    @property
    def job(self) -> Object:
        """The Job's spec; of a JobSet, that of its only one."""
        if not self.is_set:
            return self.workload["spec"]
        (replicated,) = self.workload["spec"]["replicatedJobs"]
        return replicated["template"]["spec"]

    @property
    def pod(self) -> Object:
        return self.job["template"]["spec"]

    @property
    def container(self) -> Object:
        (found,) = self.pod["containers"]
        return found

    def environment(self, index: int = 0) -> dict[str, str]:
        """What the process sees: later sources win, then ``env``; $(NAME) only where NAME stands before it."""
        values: dict[str, str] = {}
        for source in self.container["envFrom"]:
            values |= self.named("ConfigMap", source["configMapRef"]["name"])["data"]
        known: dict[str, str] = {}
        for each in self.container["env"]:
            if (origin := each.get("valueFrom")) is None:
                value = re.sub(r"\$\((\w+)\)", lambda found: known.get(found[1], found[0]), each["value"])
            else:
                annotation = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
                assert origin == {"fieldRef": {"fieldPath": annotation}}
                value = str(index)
            known[each["name"]] = value
        return values | known

    @property
    def workers(self) -> int:
        return int(self.job.get("completions", 1))


def build(folder: Path) -> Rendered:
    """Return what ``kubectl apply --kustomize`` would submit; without a flag, as the README says."""
    if shutil.which("kubectl") is None:
        pytest.skip("no manifest can be built: install kubectl 1.29 or later")
    return Rendered(kustomized(folder))


@functools.cache
def cached(folder: Path) -> Rendered:
    return build(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder to build for each name in ALL."""
    found = {"base": FOLDER / "base"} | {name: FOLDER / "overlays" / name for name in OVERLAYS}
    for name in TOGETHER:
        folder = tmp_path_factory.mktemp(name)
        near = os.path.relpath(FOLDER, folder)
        components = [f"{near}/components/{component}" for component in name.split("+")]
        text = yaml.safe_dump({"kind": "Kustomization", "resources": [f"{near}/base"], "components": components})
        (folder / "kustomization.yaml").write_text(text)
        found[name] = folder
    return found


# --- checks ------------------------------------------------------------------------------------------------------


@functools.cache  # most objects are in every overlay
def faults(text: str) -> tuple[str, ...]:
    """Return what the schemas of Kubernetes say against an object."""
    found = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(json.loads(text), version, strict=True)
        except kubernetes_validate.ValidationError as error:
            found.append(f"{json.loads(text)['kind']} in Kubernetes {version}: {error.message}")
    return tuple(found)


def schemas(rendered: Rendered) -> Problems:
    from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

    objects = [each for each in rendered.objects if each["kind"] != "JobSet"]
    if rendered.is_set:
        # The model drops what it does not know, so what comes back differs.
        again = JobsetV1alpha2JobSet.from_dict(copy.deepcopy(rendered.workload))
        if again is None or again.to_dict() != rendered.workload:
            yield "the JobSet has fields that JobSet does not know"
        objects.append({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": rendered.job})
    for each in objects:
        yield from faults(json.dumps(each))


def references(rendered: Rendered) -> Problems:
    (namespace,) = rendered.of("Namespace")
    for each in rendered.objects:
        if each["kind"] != "Namespace" and each["metadata"].get("namespace") != namespace["metadata"]["name"]:
            yield f"{each['kind']} {each['metadata']['name']} is in another namespace"
    wanted = [("ConfigMap", source["configMapRef"]["name"]) for source in rendered.container["envFrom"]]
    wanted += [("ServiceAccount", rendered.pod["serviceAccountName"])]
    volumes = rendered.pod["volumes"]
    claims = [volume["persistentVolumeClaim"] for volume in volumes if "persistentVolumeClaim" in volume]
    wanted += [("PersistentVolumeClaim", claim["claimName"]) for claim in claims]
    for kind, name in wanted:
        if name not in [each["metadata"]["name"] for each in rendered.of(kind)]:
            yield f"there is no {kind} {name}"
    for each in rendered.of("ServiceAccount"):
        account = each["metadata"].get("annotations", {}).get("iam.gke.io/gcp-service-account", "")
        if not re.fullmatch(r"[a-z-]+@[\w-]+\.iam\.gserviceaccount\.com", account):
            yield "the ServiceAccount is no Google account's"


def outcome(rendered: Rendered, code: int | None, *, disrupted: bool = False, deadline: bool = False) -> str:
    """Return what Kubernetes does after a pod ended so: fail, retry or retry uncounted."""
    job = rendered.job
    action, message = "Count", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        if "onExitCodes" in rule:
            found = rule["onExitCodes"]
            assert found["containerName"] == rendered.container["name"]
            met = code not in (None, 0) and (code in found["values"]) == (found["operator"] == "In")
            said = f"Container job for pod x/y failed with exit code {code} matching FailJob rule at index {index}"
        else:
            met = disrupted and {"type": "DisruptionTarget", "status": "True"} in rule["onPodConditions"]
            said = f"Pod x/y has condition DisruptionTarget matching FailJob rule at index {index}"
        if met:
            action, message = rule["action"], said
            break
    if not rendered.is_set:
        return "fail" if deadline else {"FailJob": "fail", "Count": "retry", "Ignore": "retry uncounted"}[action]
    reason = "DeadlineExceeded" if deadline else "PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded"
    assert action != "Ignore", "one worker alone would be replaced"
    for rule in rendered.workload["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return {"FailJobSet": "fail", "RestartJobSetAndIgnoreMaxRestarts": "retry uncounted"}[rule["action"]]
    return "retry"


def retries(rendered: Rendered) -> Problems:
    job = rendered.job
    if rendered.pod["restartPolicy"] != "Never":
        yield "restartPolicy is not Never, which podFailurePolicy asks for"
    if job["podReplacementPolicy"] != "Failed":
        yield "a pod could be replaced while it still saves"
    if rendered.is_set and (job["backoffLimit"] != 0 or rendered.workload["spec"]["failurePolicy"]["maxRestarts"] < 3):
        yield "a lost worker does not restart the set"
    if not rendered.is_set and job["backoffLimit"] < 3:
        yield "an outage of minutes ends the job"
    if not job.get("activeDeadlineSeconds"):
        yield "nothing bounds what disruptions cost"
    if not (rendered.workload["spec"]).get("ttlSecondsAfterFinished"):
        yield "it stays for ever"
    expected = {
        (ConfigError.exit_code, False): "fail",
        (ConfigError.exit_code, True): "fail",
        (UnavailableError.exit_code, False): "retry",
        (Stopped.exit_code, False): "retry",
        (Stopped.exit_code, True): "retry uncounted",
        (UNFORESEEN, False): "retry",
        (KILLED, False): "retry",
        (KILLED, True): "retry uncounted",
        (None, True): "retry uncounted",
    }
    for (code, disrupted), wanted in expected.items():
        if (received := outcome(rendered, code, disrupted=disrupted)) != wanted:
            yield f"exit code {code}{', disrupted' if disrupted else ''}: {received} instead of {wanted}"
    if outcome(rendered, None, deadline=True) != "fail":
        yield "after the deadline it starts again"


def grace(rendered: Rendered) -> Problems:
    if rendered.pod["terminationGracePeriodSeconds"] < GRACE_SECONDS + 5:
        yield "the job is killed before it has saved"


def amount(quantity: str) -> float:
    units = {"m": 1e-3, "": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
    number, unit = re.fullmatch(r"([\d.]+)([a-zA-Z]*)", quantity).groups()
    return float(number) * units[unit]


def resources(rendered: Rendered) -> Problems:
    requests, limits = (rendered.container["resources"][part] for part in ("requests", "limits"))
    for name in ("cpu", "memory", "ephemeral-storage"):
        if name not in requests or name not in limits:
            yield f"{name} has no request or no limit"
            return
    for name in {*requests, *limits}:
        if requests.get(name) != limits.get(name):
            yield f"{name}: the request is not the limit"
    folders = [volume["emptyDir"] for volume in rendered.pod["volumes"] if "emptyDir" in volume]
    if not all("sizeLimit" in folder for folder in folders):
        yield "an emptyDir has no sizeLimit"
        return
    on_disk = sum(amount(folder["sizeLimit"]) for folder in folders if folder.get("medium") != "Memory")
    in_memory = sum(amount(folder["sizeLimit"]) for folder in folders if folder.get("medium") == "Memory")
    if on_disk >= amount(limits["ephemeral-storage"]):
        yield "volumes may hold more than the pod's ephemeral storage, or leave nothing for the log"
    if in_memory > amount(limits["memory"]) / 2:
        yield "volumes in memory leave less than half of it"


def volumes(rendered: Rendered) -> Problems:
    mounts = {mount["mountPath"]: mount["name"] for mount in rendered.container["volumeMounts"]}
    names = [volume["name"] for volume in rendered.pod["volumes"]]
    if sorted(mounts.values()) != sorted(names):
        yield f"mounted are {sorted(mounts.values())}, there are {sorted(names)}"
        return
    if "/tmp" not in mounts:  # noqa: S108
        yield "there is no folder for temporary files"
    environment = rendered.environment()
    for name in ("TRANSFER_CACHE_DIR", "TFDS_DATA_DIR", "TRANSFER_DATA_DIR", "TRANSFER_OUTPUT_URI"):
        value = environment[name]
        if not value.startswith("gs://") and not any(Path(value).is_relative_to(mount) for mount in mounts):
            yield f"{name}={value} cannot be written in the container"
    output = environment["TRANSFER_OUTPUT_URI"]
    kept = [mount for mount, name in mounts.items() if "emptyDir" not in rendered.pod["volumes"][names.index(name)]]
    if not output.startswith("gs://") and not any(Path(output).is_relative_to(mount) for mount in kept):
        yield "what is published goes away with the pod"
    if rendered.is_set and not output.startswith("gs://"):
        yield "the workers publish to no common place"


def image(rendered: Rendered) -> Problems:
    on_gpu = "nvidia.com/gpu" in rendered.container["resources"]["limits"]
    if rendered.container["image"] != (wanted := f"{IMAGE}:{VERSION}{'' if on_gpu else '-cpu'}"):
        yield f"the image is {rendered.container['image']} instead of {wanted}"
    # The image has CUDA from Python packages, and where GKE mounts the driver is not on its loader's path.
    if on_gpu != (rendered.environment().get("LD_LIBRARY_PATH") == "/usr/local/nvidia/lib64"):
        yield "the GPU's driver is not found on GKE"


def settings(rendered: Rendered) -> Problems:
    for index in range(rendered.workers):
        environment = {name: value.replace("BUCKET", "bucket") for name, value in rendered.environment(index).items()}
        try:
            load(environment)
        except ConfigError as error:
            yield f"worker {index}: {error}"


def secrets(rendered: Rendered) -> Problems:
    yield from secrets_in(yaml.safe_dump_all(rendered.objects, width=1000))
    if rendered.of("Secret"):
        yield "there is a Secret"


def restricted(pod: Object) -> Problems:
    """What the restricted profile of Kubernetes' Pod Security Standards forbids."""
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield name
    of_pod = pod.get("securityContext", {})
    if of_pod.get("sysctls"):
        yield "sysctls"
    kinds = {kind for volume in pod.get("volumes", []) for kind in volume if kind != "name"}
    allowed = {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
    yield from kinds - allowed
    for container in [*pod["containers"], *pod.get("initContainers", []), *pod.get("ephemeralContainers", [])]:
        context = container.get("securityContext", {})
        both = of_pod | context
        if both.get("runAsNonRoot") is not True or both.get("runAsUser") in (None, 0):
            yield "may run as root"
        if both.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
            yield "no seccomp profile"
        if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
            yield "may gain privileges"
        if context.get("capabilities") != {"drop": ["ALL"]}:
            yield "keeps capabilities"
        if "procMount" in context or "seLinuxOptions" in both:
            yield "procMount or SELinux options"
        if any("hostPort" in port for port in container.get("ports", [])):
            yield "hostPort"


def security(rendered: Rendered) -> Problems:
    labels = rendered.of("Namespace")[0]["metadata"]["labels"]
    if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
        yield "the namespace does not enforce the restricted profile"
    yield from restricted(rendered.pod)
    if rendered.container["securityContext"].get("readOnlyRootFilesystem") is not True:
        yield "the root can be written"
    if rendered.pod["securityContext"].get("runAsUser") != 10001:
        yield "not the image's user"
    if rendered.pod.get("enableServiceLinks") is not False:
        yield "a Service can inject TRANSFER_ variables"
    (account,) = rendered.of("ServiceAccount")
    if rendered.pod.get("automountServiceAccountToken") is not False or account["automountServiceAccountToken"]:
        yield "the pod gets a token of the cluster"


def selectors(rendered: Rendered) -> Problems:
    labels = rendered.job["template"]["metadata"]["labels"].items()
    policies = rendered.of("NetworkPolicy")
    if not any(policy["spec"]["podSelector"] == {} and not policy["spec"].get("ingress") for policy in policies):
        yield "nothing denies ingress"
    for policy in policies:
        sources = [peer for rule in policy["spec"].get("ingress", []) for peer in rule["from"]]
        for selector in [policy["spec"]["podSelector"], *(peer["podSelector"] for peer in sources)]:
            if not selector.get("matchLabels", {}).items() <= labels:
                yield f"{policy['metadata']['name']} selects no pod of ours"
    allowed = [rule for policy in policies for rule in policy["spec"].get("ingress", [])]
    if rendered.is_set != bool(allowed) or any("ports" in rule for rule in allowed):
        yield "workers, and only they, reach each other on every port"


def workers(rendered: Rendered) -> Problems:
    if not rendered.is_set:
        if "TF_CONFIG" in rendered.environment() or rendered.workers != 1:
            yield "a Job has one worker"
        return
    job, spec, name = rendered.job, rendered.workload["spec"], rendered.workload["metadata"]["name"]
    (replicated,) = spec["replicatedJobs"]
    if job["completionMode"] != "Indexed" or job["parallelism"] != job["completions"] or replicated["replicas"] != 1:
        yield "not all workers run at once, with an index each"
    if not spec["network"]["enableDNSHostnames"] or not spec["network"]["publishNotReadyAddresses"]:
        yield "workers do not find each other"
    port = next(each["containerPort"] for each in rendered.container["ports"] if each["name"] == "grpc")
    hosts = [
        f"{name}-{replicated['name']}-0-{index}.{spec['network']['subdomain']}:{port}"
        for index in range(job["completions"])
    ]
    for index in range(job["completions"]):
        text = rendered.environment(index)["TF_CONFIG"]
        try:
            config = json.loads(text)
        except ValueError:
            config = text
        if config != {"cluster": {"worker": hosts}, "task": {"type": "worker", "index": index}}:
            yield f"worker {index} is told {config}, the pods are {hosts}"


CHECKS: dict[str, Callable[[Rendered], Problems]] = {
    check.__name__: check
    for check in (
        schemas,
        references,
        retries,
        grace,
        resources,
        volumes,
        image,
        settings,
        secrets,
        security,
        selectors,
        workers,
    )
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ALL)
def test_a_manifest_is_right(name: str, check: str, folders: dict[str, Path]) -> None:
    assert list(CHECKS[check](copy.deepcopy(cached(folders[name])))) == []


# --- each check sees what it is for --------------------------------------------------------------------------------


def change(path: str, value: object = None) -> Callable[[Rendered], None]:
    """Return what sets ``path`` of a rendered manifest, or removes it where the value is None."""

    def apply(rendered: Rendered) -> None:
        first, *names = (part.replace("~", "/") for part in path.split("/"))
        place: Any = getattr(rendered, first)
        for name in names[:-1]:
            place = place[int(name) if isinstance(place, list) else name]
        last: Any = int(names[-1]) if isinstance(place, list) else names[-1]
        if value is None:
            del place[last]
        else:
            place[last] = value

    return apply


def drop(kind: str) -> Callable[[Rendered], None]:
    def apply(rendered: Rendered) -> None:
        rendered.objects = [each for each in rendered.objects if each["kind"] != kind]

    return apply


JOB, SET = "base", "multi-worker"
BREAKS: list[tuple[str, str, Callable[[Rendered], None]]] = [
    ("schemas", JOB, change("pod/readOnlyRoot", True)),
    ("schemas", JOB, change("job/backoffLimit", "6")),
    ("schemas", SET, change("job/backofLimit", 6)),
    ("schemas", SET, change("workload/spec/network/enableDnsHostnames", True)),
    ("schemas", SET, change("workload/spec/failurePolicy/rules/0/onExitCodes", [78])),
    ("references", JOB, change("container/envFrom/0/configMapRef/name", "preset-article")),
    ("references", JOB, drop("ServiceAccount")),
    ("references", "cpu", drop("PersistentVolumeClaim")),
    ("references", SET, change("workload/metadata/namespace", "default")),
    ("references", JOB, lambda rendered: rendered.of("ServiceAccount")[0]["metadata"].pop("annotations")),
    ("retries", JOB, change("pod/restartPolicy", "OnFailure")),
    ("retries", JOB, change("job/podFailurePolicy/rules/0/onExitCodes/values", [77])),
    ("retries", JOB, change("job/podFailurePolicy/rules/0/onExitCodes/values", [74, 78])),
    ("retries", JOB, change("job/podFailurePolicy/rules/1")),
    ("retries", JOB, change("job/podFailurePolicy/rules/2/action", "Ignore")),
    ("retries", JOB, change("job/podReplacementPolicy", "TerminatingOrFailed")),
    ("retries", JOB, change("job/backoffLimit", 0)),
    ("retries", JOB, change("job/activeDeadlineSeconds")),
    ("retries", SET, change("job/activeDeadlineSeconds")),
    ("retries", SET, change("job/backoffLimit", 6)),
    ("retries", SET, change("job/podFailurePolicy/rules/0")),
    ("retries", SET, change("workload/spec/failurePolicy/rules/0")),
    ("retries", SET, change("workload/spec/failurePolicy/rules/0/onJobFailureMessagePatterns")),
    ("retries", SET, change("workload/spec/failurePolicy/rules/2")),
    ("retries", SET, change("workload/spec/failurePolicy/maxRestarts", 0)),
    ("retries", SET, change("workload/spec/ttlSecondsAfterFinished")),
    ("grace", JOB, change("pod/terminationGracePeriodSeconds", 25)),
    ("resources", JOB, change("container/resources/requests/nvidia.com~gpu", "2")),
    ("resources", JOB, change("container/resources/limits/memory")),
    ("resources", JOB, change("container/resources/limits/memory", "17Gi")),
    ("resources", JOB, change("pod/volumes/0/emptyDir/sizeLimit")),
    ("resources", JOB, change("pod/volumes/0/emptyDir/sizeLimit", "22Gi")),
    ("resources", "multi-gpu", change("pod/volumes/0/emptyDir/sizeLimit", "100Gi")),
    ("volumes", JOB, change("container/volumeMounts/0/name", "cash")),
    ("volumes", JOB, change("container/volumeMounts/1/mountPath", "/temp")),
    ("volumes", JOB, change("container/volumeMounts/0/mountPath", "/scratch")),
    ("volumes", JOB, lambda rendered: rendered.container["envFrom"].reverse() or preset(rendered, "solar-demo", 1)),
    ("volumes", JOB, lambda rendered: place(rendered, "TRANSFER_OUTPUT_URI", "/cache/output")),
    ("volumes", SET, lambda rendered: place(rendered, "TRANSFER_OUTPUT_URI", "/output")),
    ("image", JOB, change("container/image", f"{IMAGE}:latest")),
    ("image", JOB, change("container/image", IMAGE)),
    ("image", "cpu", change("container/image", f"{IMAGE}:0.1.0")),
    ("image", JOB, change("container/env/2")),
    ("settings", JOB, change("container/env/0/name", "TRANSFER_CACHEDIR")),
    ("settings", JOB, change("container/env/0/value", "gs://bucket/cache")),
    ("settings", JOB, lambda rendered: place(rendered, "TRANSFER_EPOCHS", "many")),
    ("secrets", JOB, lambda rendered: place(rendered, "GOOGLE_TOKEN", "ya29.c.b0AXv0zTPQ")),
    ("secrets", JOB, change("container/env/0", {"name": "X", "value": "-----BEGIN PRIVATE KEY-----"})),
    ("security", JOB, lambda rendered: rendered.of("Namespace")[0]["metadata"].update(labels={})),
    ("security", JOB, change("pod/securityContext/runAsNonRoot")),
    ("security", JOB, change("pod/securityContext/runAsUser", 1000)),
    ("security", JOB, change("pod/securityContext/seccompProfile")),
    ("security", JOB, change("pod/hostNetwork", True)),
    ("security", JOB, change("pod/volumes/0", {"name": "cache", "hostPath": {"path": "/mnt"}})),
    ("security", JOB, change("container/securityContext/allowPrivilegeEscalation")),
    ("security", JOB, change("container/securityContext/capabilities", {"drop": ["ALL"], "add": ["SYS_ADMIN"]})),
    ("security", JOB, change("container/securityContext/readOnlyRootFilesystem", False)),
    ("security", JOB, change("pod/enableServiceLinks", True)),
    ("security", JOB, change("pod/automountServiceAccountToken")),
    ("security", SET, change("container/ports/0/hostPort", 2222)),
    ("selectors", JOB, drop("NetworkPolicy")),
    ("selectors", SET, change("job/template/metadata/labels/app.kubernetes.io~component", "workers")),
    ("selectors", SET, lambda rendered: rendered.objects.remove(rendered.named("NetworkPolicy", "workers"))),
    ("selectors", SET, lambda rendered: only_port(rendered, 2222)),
    ("workers", JOB, change("job/completions", 2)),
    ("workers", SET, change("job/completions", 3)),
    ("workers", SET, change("job/completionMode", "NonIndexed")),
    ("workers", SET, change("workload/metadata/name", "other")),
    ("workers", SET, change("workload/spec/network/subdomain", "other")),
    ("workers", SET, change("workload/spec/network/publishNotReadyAddresses", False)),
    ("workers", SET, change("container/ports/0/containerPort", 2223)),
    ("workers", SET, lambda rendered: rendered.container["env"].reverse()),
]


def place(rendered: Rendered, name: str, value: str) -> None:
    rendered.named("ConfigMap", rendered.container["envFrom"][1]["configMapRef"]["name"])["data"][name] = value


def preset(rendered: Rendered, name: str, position: int) -> None:
    (found,) = (each for each in rendered.of("ConfigMap") if each["metadata"]["name"].startswith(f"preset-{name}-"))
    rendered.container["envFrom"][position]["configMapRef"]["name"] = found["metadata"]["name"]


def only_port(rendered: Rendered, port: int) -> None:
    rendered.named("NetworkPolicy", "workers")["spec"]["ingress"][0]["ports"] = [{"port": port}]


@pytest.mark.parametrize(
    ("check", "name", "spoil"), BREAKS, ids=[f"{row}-{each[0]}" for row, each in enumerate(BREAKS)]
)
def test_a_broken_manifest_is_seen(
    check: str, name: str, spoil: Callable[[Rendered], object], folders: dict[str, Path]
) -> None:
    spoiled = copy.deepcopy(cached(folders[name]))
    spoil(spoiled)
    assert spoiled != cached(folders[name])
    assert list(CHECKS[check](spoiled))


def test_every_check_has_been_seen_to_fail() -> None:
    assert {check for check, _, _ in BREAKS} == set(CHECKS)


# --- what single overlays are for ----------------------------------------------------------------------------------


def test_a_worker_is_the_jobs_pod_with_a_place_in_the_cluster(folders: dict[str, Path]) -> None:
    single, several = (copy.deepcopy(cached(folders[name]).job["template"]) for name in ("base", "multi-worker"))
    del several["metadata"]["labels"]["app.kubernetes.io/component"]
    (container,) = several["spec"]["containers"]
    del container["ports"]
    container["env"] = [each for each in container["env"] if each["name"] not in ("WORKER_INDEX", "TF_CONFIG")]
    assert several == single


def test_the_placeholders_are_refused_before_anything_is_done(folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        load(cached(folders["base"]).environment())
    refused = {problem.variable for problem in caught.value.problems}
    assert refused == {"TRANSFER_OUTPUT_URI", "TRANSFER_DATA_DIR"}


def test_a_gke_spot_pod_goes_to_spot_machines_with_its_gpu(folders: dict[str, Path]) -> None:
    pod = cached(folders["gke-spot"]).pod
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-l4",
        "cloud.google.com/gke-spot": "true",
    }
    tolerated = {(each["key"], each["operator"], each.get("value"), each["effect"]) for each in pod["tolerations"]}
    assert tolerated == {
        ("cloud.google.com/gke-spot", "Equal", "true", "NoSchedule"),
        ("nvidia.com/gpu", "Exists", None, "NoSchedule"),
    }


@pytest.mark.parametrize(("name", "gpus"), [("base", "1"), ("multi-gpu", "4"), ("multi-worker", "1"), ("cpu", None)])
def test_a_pod_asks_for_its_gpus(name: str, gpus: str | None, folders: dict[str, Path]) -> None:
    rendered = cached(folders[name])
    assert rendered.container["resources"]["limits"].get("nvidia.com/gpu") == gpus
    assert ("tolerations" in rendered.pod) == (gpus is not None)


def test_several_gpus_have_shared_memory(folders: dict[str, Path]) -> None:
    rendered = cached(folders["multi-gpu"])
    (mount,) = (each for each in rendered.container["volumeMounts"] if each["mountPath"] == "/dev/shm")  # noqa: S108
    (volume,) = (each for each in rendered.pod["volumes"] if each["name"] == mount["name"])
    assert volume["emptyDir"]["medium"] == "Memory"
    assert amount(volume["emptyDir"]["sizeLimit"]) > amount("64Mi")


@pytest.mark.parametrize("name", [name for name in ALL if "queued" in name])
def test_a_queued_workload_waits_for_kueue(name: str, folders: dict[str, Path]) -> None:
    workload = cached(folders[name]).workload
    assert re.fullmatch(r"[a-z0-9-]{1,63}", workload["metadata"]["labels"]["kueue.x-k8s.io/queue-name"])
    assert workload["spec"]["suspend"] is True


@pytest.mark.parametrize("name", [name for name in ALL if "queued" not in name])
def test_nothing_else_waits(name: str, folders: dict[str, Path]) -> None:
    workload = cached(folders[name]).workload
    assert "kueue.x-k8s.io/queue-name" not in workload["metadata"]["labels"]
    assert "suspend" not in workload["spec"]


def test_the_reader_may_look_at_the_cpu_overlays_volume(folders: dict[str, Path]) -> None:
    reader, rendered = yaml.safe_load((FOLDER / "reader.yaml").read_text()), cached(folders["cpu"])
    for version in VERSIONS:
        kubernetes_validate.validate(reader, version, strict=True)
    assert list(restricted(reader["spec"])) == []
    assert reader["metadata"]["namespace"] == rendered.of("Namespace")[0]["metadata"]["name"]
    (container,) = reader["spec"]["containers"]
    assert container["image"] == rendered.container["image"]
    (volume,) = reader["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == rendered.of("PersistentVolumeClaim")[0]["metadata"]["name"]
    (mount,) = container["volumeMounts"]
    assert mount["mountPath"] == rendered.environment()["TRANSFER_OUTPUT_URI"]


def test_no_file_has_a_secret() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix != ".md"]
    assert len(files) > 10
    assert {path.name: secrets_in(path.read_text()) for path in files if secrets_in(path.read_text())} == {}


# --- what the README tells to type ---------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


LINES = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
ENVIRONMENT = {"PROJECT": "my-project", "BUCKET": "my-bucket"}


def commands(program: str) -> list[list[str]]:
    """The README's commands of a program, as words; also those inside $( )."""
    flat = [re.sub(r"^\w+=\$\((.*)\)$", r"\1", line).split(" | ")[0] for line in LINES]
    return [words for line in flat if (words := shlex.split(line, comments=True)) and words[0] == program]


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of deploy/ after the README's commands for the place, and with its overlay of one's own."""
    root = tmp_path_factory.mktemp("placed")
    shutil.copytree(ROOT / "deploy", root / "deploy")
    script = "\n".join(blocks("sh")[:2])
    subprocess.run(["/bin/bash", "-euc", script], cwd=root, check=True)
    (own,) = blocks("yaml")
    mine = root / "deploy" / "kubernetes" / "overlays" / "mine"
    mine.mkdir()
    (mine / "kustomization.yaml").write_text(own)
    return root


@pytest.mark.parametrize("name", [*OVERLAYS, "mine"])
def test_the_readmes_commands_set_the_place(name: str, placed: Path) -> None:
    rendered = build(placed / "deploy" / "kubernetes" / "overlays" / name)
    text = yaml.safe_dump_all(rendered.objects)
    assert "PROJECT" not in text
    assert "BUCKET" not in text
    repository, _, version = rendered.container["image"].rpartition(":")
    assert repository == "REGISTRY/my-project/transfer-learning-job"
    assert version == VERSION
    (account,) = rendered.of("ServiceAccount")
    assert account["metadata"]["annotations"] == {
        "iam.gke.io/gcp-service-account": "transfer-learning@my-project.iam.gserviceaccount.com"
    }
    settings = load(rendered.environment())
    if name == "cpu":
        assert (settings.data.dataset, settings.output.output_uri) == ("solar_cells", "/output")
    else:
        assert (settings.data.dataset, settings.output.output_uri) == ("tf_flowers", "gs://my-bucket/runs")
        assert settings.data.data_dir == "gs://my-bucket/tfds"


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "image"])
def test_an_overlay_of_ones_own_is_right(check: str, placed: Path) -> None:
    rendered = cached(placed / "deploy" / "kubernetes" / "overlays" / "mine")
    assert rendered.is_set
    assert rendered.pod["nodeSelector"]
    assert rendered.workload["spec"]["suspend"]
    assert list(CHECKS[check](copy.deepcopy(rendered))) == []


def test_the_tables_list_every_folder_and_overlay() -> None:
    listed = re.findall(r"^\| `([a-z-]+)` \|", README, flags=re.MULTILINE)
    assert sorted(listed) == OVERLAYS
    assert sorted(path.parent.name for path in FOLDER.glob("components/*/kustomization.yaml")) == OVERLAYS


def test_the_table_of_exit_codes_says_what_the_manifests_do(folders: dict[str, Path]) -> None:
    rows = re.findall(r"^\| [^|]+ \| (\d+)[^|]* \| ([^|]*) \| ([^|]*) \|$", README, flags=re.MULTILINE)
    said = {"fail": "fails", "retry": "six times at most", "retry uncounted": "uncounted"}
    seen = set()
    for code, of_job, of_set in rows:
        disrupted = "uncounted" in of_job
        deadline = "two days" in of_set
        for name, words in (("base", of_job), ("multi-worker", of_set)):
            if words:
                received = outcome(cached(folders[name]), int(code), disrupted=disrupted, deadline=deadline)
                assert said[received] in words or "seen before the loss" in words
        seen.add(int(code))
    assert seen == {ConfigError.exit_code, UnavailableError.exit_code, Stopped.exit_code, UNFORESEEN, KILLED}
    assert cached(folders["base"]).job["backoffLimit"] == 6
    assert cached(folders["multi-worker"]).workload["spec"]["failurePolicy"]["maxRestarts"] == 6
    assert cached(folders["base"]).job["activeDeadlineSeconds"] == 2 * 24 * 3600


def test_kubectl_knows_the_flags_and_the_files_and_names_are_there(folders: dict[str, Path]) -> None:
    found = commands("kubectl")
    assert {words[1] for words in found} == {"kustomize", "apply", "logs", "wait", "get", "describe", "delete", "cp"}
    everything = [cached(folders[name]) for name in ALL]
    kinds = {"job": "Job", "jobset": "JobSet"}
    for words in found:
        check_flags(["kubectl", words[1]], words[2:], ["kubectl", "options"])
        options = dict(itertools.pairwise(words))
        for option in ("--kustomize", "kustomize"):
            if option in options:
                assert ROOT / options[option] in folders.values()
        if "--filename" in options:
            assert (ROOT / options["--filename"]).is_file()
        if "--kustomize" not in options and "--filename" not in options and words[1] != "kustomize":
            namespaces = {each.of("Namespace")[0]["metadata"]["name"] for each in everything}
            assert {options["--namespace"]} == namespaces
        if "--selector" in options:
            name, value = options["--selector"].split("=")
            assert any(each.job["template"]["metadata"]["labels"].get(name) == value for each in everything)
        for kind, name in re.findall(r"\b(job|jobset)/([a-z0-9-]+)$", words[-1]):
            names = {(each.workload["kind"], each.workload["metadata"]["name"]) for each in everything}
            names |= {("Job", f"{name}-worker-0") for kind, name in names if kind == "JobSet"}
            assert (kinds[kind], name) in names


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="commands are not checked: install the Google Cloud CLI")
@pytest.mark.parametrize("words", commands("gcloud"), ids=lambda words: "-".join(words[1:4]))
def test_gcloud_knows_the_command_and_its_flags(words: list[str], tmp_path: Path) -> None:
    named = ("transfer-learning", "spot-l4")
    command = list(itertools.takewhile(lambda word: re.fullmatch(r"[a-z-]+", word) and word not in named, words))
    assert len(command) > 2
    check_flags(command, words[len(command) :], None, CLOUDSDK_CONFIG=str(tmp_path))


@pytest.mark.skipif(shutil.which("docker") is None, reason="the build command is not checked: install the docker CLI")
def test_docker_knows_the_flags_and_the_dockerfile_the_arguments(folders: dict[str, Path]) -> None:
    (words,) = commands("docker")
    check_flags(words[:2], words[2:], None)
    given = {after.split("=")[0] for word, after in itertools.pairwise(words) if word == "--build-arg"}
    text = (ROOT / words[words.index("--file") + 1]).read_text(encoding="utf-8")
    assert given <= set(re.findall(r"^ARG (\w+)", text, flags=re.MULTILINE))
    assert words[words.index("--tag") + 1] == cached(folders["cpu"]).container["image"]
    assert commands("kind") == [["kind", "load", "docker-image", cached(folders["cpu"]).container["image"]]]


def test_a_flag_that_a_command_does_not_have_is_seen() -> None:
    with pytest.raises(AssertionError, match=r"kubectl logs does not know \{'--folow'\}"):
        check_flags(["kubectl", "logs"], ["--folow", "job/x"], None)


def check_flags(command: list[str], arguments: list[str], general: list[str] | None, **environment: str) -> None:
    """Hold the flags among a command's arguments against its help, and the program's general help if there is one."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"flags are not checked: install {command[0]}")
    flags = {argument.split("=")[0] for argument in arguments if argument.startswith("--")}
    text = ""
    for asked in ([*command, "--help"], general):
        if asked is not None:
            done = subprocess.run(asked, env=os.environ | environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            text += re.sub(r"\x1b\[\d*m|.\x08", "", done.stdout)
    known = set(re.findall(r"--[a-z-]+", text.replace("--[no-]", "--")))
    assert flags <= known, f"{' '.join(command)} does not know {flags - known}"


def test_the_account_has_no_more_than_it_needs() -> None:
    granted = {(words[1], words[-1]) for words in commands("gcloud") if words[-1].startswith("--role=")}
    assert granted == {("storage", "--role=roles/storage.objectUser"), ("iam", "--role=roles/iam.workloadIdentityUser")}
    for role in re.findall(r"roles/[\w.]+", README):
        assert not role.endswith(("admin", "Admin", "owner", "editor"))


def test_the_pods_account_is_the_one_that_may_use_the_google_account(folders: dict[str, Path]) -> None:
    rendered = cached(folders["base"])
    (account,) = rendered.of("ServiceAccount")
    subject = f"[{account['metadata']['namespace']}/{account['metadata']['name']}]"
    (binding,) = (words for words in commands("gcloud") if words[-1].endswith("workloadIdentityUser"))
    (member,) = (word for word in binding if word.startswith("--member="))
    assert member == f"--member=serviceAccount:$PROJECT.svc.id.goog{subject}"


def test_the_run_id_is_found_in_a_real_log() -> None:
    (line,) = (line for line in LINES if line.startswith("RUN_ID="))
    filters = line.removesuffix(")").split(" | ", 1)[1]
    formatter = JsonFormatter()
    log = ""
    for message, fields in [("devices", {}), ("run pets-1", {"run_id": "pets-1"}), ("published", {"run_id": "other"})]:
        record = logging.makeLogRecord({"msg": message, "levelname": "INFO", **fields})
        log += formatter.format(record) + "\n"
    done = subprocess.run(["/bin/bash", "-euc", filters], input=log, capture_output=True, text=True, check=True)
    assert done.stdout == "pets-1\n"


def test_every_other_command_is_a_known_one() -> None:
    programs = {words[0] for line in LINES if (words := shlex.split(line, comments=True))}
    assert {program for program in programs if "=" not in program} == {
        "docker",
        "export",
        "gcloud",
        "kind",
        "kubectl",
        "python",
        "sed",
    }
    assert ["python", "-m", "job", "verify"] in [words[:4] for words in commands("python")]
