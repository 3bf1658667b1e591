"""The manifests in deploy/kubernetes: built by kubectl, valid, and right in what schemas let pass."""

from __future__ import annotations

import copy
import functools
import ipaddress
import itertools
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import kubernetes_validate
import pytest
import yaml

from job.errors import ConfigError, Stopped, UnavailableError
from job.machine.console import JsonFormatter
from job.settings.environment import load
from job.stopping import GRACE_SECONDS
from tests.deploy.test_env_files import kustomized, secrets_in
from tests.support.running import ROOT
from tests.support.servers import Handler, serving

FOLDER = ROOT / "deploy" / "kubernetes"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
OVERLAYS = sorted(path.parent.name for path in (FOLDER / "overlays").glob("*/kustomization.yaml"))
# Components that go together; the one order that matters is held by a test of its own.
TOGETHER = ("gke-spot+multi-gpu", "gke-spot+multi-gpu+multi-worker+queued", "cpu+queued")
ALL = ("base", *OVERLAYS, *TOGETHER)
# The oldest that the README names, and the newest whose schemas the package carries.
VERSIONS = ("1.29", kubernetes_validate.latest_version())
IMAGE = "transfer-learning-job"
DIGEST = "sha256:" + "0123456789abcdef" * 4
# What a submission is called by the README's command, as the shell fills it in.
RUN = "transfer-learning-20260102-030405"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
# What a killed process leaves, and what the kernel does to one that takes too much memory.
UNFORESEEN, KILLED = 1, 137

# How the job learns how much disk its pod may fill, in bytes.
STORAGE_LIMIT = "EPHEMERAL_STORAGE_LIMIT"

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
            elif "resourceFieldRef" in origin:
                assert origin["resourceFieldRef"]["divisor"] == "1"
                kind, name = origin["resourceFieldRef"]["resource"].split(".", 1)
                value = str(int(amount(self.container["resources"][kind][name])))
            else:
                annotation = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
                assert origin == {"fieldRef": {"fieldPath": annotation}}
                value = str(index)
            known[each["name"]] = value
        return values | known

    @property
    def workers(self) -> int:
        return int(self.job.get("completions", 1))


def need_kubectl() -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no manifest can be built: install kubectl 1.29 or later")


def build(folder: Path, run: str = RUN) -> Rendered:
    """Return what is in the cluster once the README's commands have applied the namespace and submitted a folder."""
    need_kubectl()
    deploy = next(parent for parent in (folder, FOLDER) for parent in parent.parents if parent.name == "deploy")
    return Rendered(copy.deepcopy(shared(deploy)) + submitted(kustomized(folder), run))


@functools.cache
def shared(deploy: Path) -> list[Object]:
    return kustomized(deploy / "kubernetes" / "namespace")


def submitted(objects: list[Object], run: str = RUN) -> list[Object]:
    """Return objects after the README's sed."""
    return list(yaml.safe_load_all(yaml.safe_dump_all(objects).replace("${RUN}", run)))


@functools.cache
def cached(folder: Path) -> Rendered:
    return build(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder to build for each name in ALL."""
    found = {"base": FOLDER / "base"} | {name: FOLDER / "overlays" / name for name in OVERLAYS}
    for name in TOGETHER:
        found[name] = combined(tmp_path_factory.mktemp(name), name.split("+"))
    return found


def combined(folder: Path, components: Sequence[str]) -> Path:
    """Make an overlay of components, in this order, and return its folder."""
    near = os.path.relpath(FOLDER, folder)
    places = [f"{near}/components/{component}" for component in components]
    text = yaml.safe_dump({"kind": "Kustomization", "resources": [f"{near}/base"], "components": places})
    (folder / "kustomization.yaml").write_text(text)
    return folder


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
    environment = rendered.environment()
    for folder in folders:
        if folder.get("medium") != "Memory" and f"{amount(folder['sizeLimit']):.0f}" != environment.get(STORAGE_LIMIT):
            yield "a volume's limit is another than the one that the job is told"
    if environment.get(STORAGE_LIMIT) != f"{amount(limits['ephemeral-storage']):.0f}":
        yield "the job is told another limit than the pod has, or none"
    in_memory = sum(amount(folder["sizeLimit"]) for folder in folders if folder.get("medium") == "Memory")
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
    # No registry gives a digest to an image that was loaded into the nodes.
    wanted = rf".+/{IMAGE}@sha256:(DIGEST|[0-9a-f]{{64}})" if on_gpu else re.escape(f"{IMAGE}:{VERSION}-cpu")
    if not re.fullmatch(wanted, rendered.container["image"]):
        yield f"the image is {rendered.container['image']} instead of {wanted}"
    if rendered.container.get("imagePullPolicy") != "IfNotPresent":
        yield "an image that is there is pulled again, or by the tag's rule"
    if rendered.environment().get("JOB_IMAGE") != (rendered.container["image"] if on_gpu else None):
        yield "the manifest would name another image than the one that runs"
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
    if any(rendered.pod["securityContext"].get(name) != 10001 for name in ("runAsUser", "runAsGroup", "fsGroup")):
        yield "not the image's user and group"
    if rendered.pod.get("enableServiceLinks") is not False:
        yield "a Service can inject TRANSFER_ variables"
    (account,) = rendered.of("ServiceAccount")
    if rendered.pod.get("automountServiceAccountToken") is not False or account["automountServiceAccountToken"]:
        yield "the pod gets a token of the cluster"


def selected(policy: Object, labels: dict[str, str]) -> bool:
    return bool(policy["spec"]["podSelector"].get("matchLabels", {}).items() <= labels.items())


def selectors(rendered: Rendered) -> Problems:
    """Who may connect to the job: nobody, or a worker of the same run."""
    labels = rendered.job["template"]["metadata"]["labels"]
    policies = rendered.of("NetworkPolicy")
    if not any(each["spec"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} for each in policies):
        yield "not everything is denied that no policy allows"
    for policy in policies:
        if not selected(policy, labels):
            yield f"{policy['metadata']['name']} selects no pod of ours"
    run = {"app.kubernetes.io/instance": rendered.workload["metadata"]["name"]}
    if not run.items() <= labels.items() or not run.items() <= rendered.workload["metadata"]["labels"].items():
        yield "the run's pods cannot be told from another run's"
    allowed = [rule for policy in policies for rule in policy["spec"].get("ingress", [])]
    peers = [peer for rule in allowed for peer in rule["from"]]
    peers += [peer for rule in outgoing(rendered) for peer in rule["to"] if "ports" not in rule]
    if [set(peer) for peer in peers] != [{"podSelector"}] * (2 if rendered.is_set else 0):
        yield "workers, and only they, reach each other, both ways"
    for peer in peers:
        wanted = peer["podSelector"]["matchLabels"]
        if not run.items() <= wanted.items() <= labels.items() or "app.kubernetes.io/component" not in wanted:
            yield "a worker reaches pods that are no workers of its run"
    if any("ports" in rule for rule in allowed):
        yield "NCCL takes ports as it finds them"


def outgoing(rendered: Rendered) -> list[Object]:
    labels = rendered.job["template"]["metadata"]["labels"]
    policies = [each for each in rendered.of("NetworkPolicy") if selected(each, labels)]
    return [rule for policy in policies for rule in policy["spec"].get("egress", [])]


def reachable(rendered: Rendered, address: str, port: int, protocol: str = "TCP") -> bool:
    """Return whether the job may connect to an address outside of the cluster."""
    host = ipaddress.ip_address(address)
    for rule in outgoing(rendered):
        blocks = [peer["ipBlock"] for peer in rule["to"] if "ipBlock" in peer]
        inside = any(
            host in ipaddress.ip_network(block["cidr"])
            and not any(host in ipaddress.ip_network(cidr) for cidr in block.get("except", []))
            for block in blocks
        )
        if inside and {"port": port, "protocol": protocol} in rule.get("ports", []):
            return True
    return False


# Addresses as Google documents them; 203.0.113.0/24 and 198.51.100.0/24 are nobody's.
NEEDED = (
    ("10.96.0.10", 53, "UDP"),  # the cluster's DNS as a Service
    ("34.118.224.10", 53, "TCP"),  # the same in GKE's own range
    ("169.254.20.10", 53, "UDP"),  # NodeLocal DNSCache
    ("169.254.169.254", 53, "UDP"),  # Cloud DNS for GKE
    ("169.254.169.254", 80, "TCP"),  # the metadata server, Dataplane V2
    ("169.254.169.252", 987, "TCP"),  # the same under Calico
    ("169.254.169.252", 988, "TCP"),
    ("199.36.153.4", 443, "TCP"),  # restricted.googleapis.com
    ("199.36.153.7", 443, "TCP"),
    ("199.36.153.8", 443, "TCP"),  # private.googleapis.com
    ("199.36.153.11", 443, "TCP"),
)
CLOSED = (
    ("203.0.113.1", 443, "TCP"),
    ("203.0.113.1", 53, "UDP"),
    ("199.36.153.12", 443, "TCP"),
    ("199.36.153.8", 80, "TCP"),
    ("10.0.0.1", 443, "TCP"),  # the API server, another tenant
    ("192.168.1.1", 80, "TCP"),
    ("169.254.169.254", 443, "TCP"),
    ("169.254.170.2", 80, "TCP"),  # another cloud's credentials
)


def egress(rendered: Rendered) -> Problems:
    """What the job may connect to."""
    for place in NEEDED:
        if not reachable(rendered, *place):
            yield f"{place} is closed"
    for place in CLOSED:
        if reachable(rendered, *place):
            yield f"{place} is open"
    named = [peer for rule in outgoing(rendered) for peer in rule["to"] if "namespaceSelector" in peer]
    if named != [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}]:
        yield "DNS is not asked in kube-system, or another namespace is reached"


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
        egress,
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
OUTWARDS = "dns-metadata-google"
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
    ("resources", JOB, change("pod/volumes/0/emptyDir/sizeLimit", "20Gi")),
    ("resources", JOB, change("pod/volumes/1/emptyDir/sizeLimit", "27Gi")),
    ("resources", JOB, change("container/env/3")),
    ("resources", JOB, change("container/env/3/valueFrom/resourceFieldRef/resource", "limits.memory")),
    ("resources", "multi-gpu", change("pod/volumes/0/emptyDir/sizeLimit", "100Gi")),
    ("volumes", JOB, change("container/volumeMounts/0/name", "cash")),
    ("volumes", JOB, change("container/volumeMounts/1/mountPath", "/temp")),
    ("volumes", JOB, change("container/volumeMounts/0/mountPath", "/scratch")),
    ("volumes", JOB, lambda rendered: rendered.container["envFrom"].reverse() or preset(rendered, "solar-demo", 1)),
    ("volumes", JOB, lambda rendered: place(rendered, "TRANSFER_OUTPUT_URI", "/cache/output")),
    ("volumes", SET, lambda rendered: place(rendered, "TRANSFER_OUTPUT_URI", "/output")),
    ("image", JOB, change("container/image", f"REGISTRY/{IMAGE}:{VERSION}")),
    ("image", JOB, change("container/imagePullPolicy", "Always")),
    ("image", "cpu", change("container/imagePullPolicy")),
    ("image", JOB, change("container/image", IMAGE)),
    ("image", "cpu", change("container/image", f"{IMAGE}:0.1.0")),
    ("image", JOB, change("container/env/2")),
    ("image", JOB, change("container/env/4/value", f"REGISTRY/{IMAGE}@sha256:{'0' * 64}")),
    ("settings", JOB, change("container/env/0/name", "TRANSFER_CACHEDIR")),
    ("settings", JOB, change("container/env/0/value", "gs://bucket/cache")),
    ("settings", JOB, lambda rendered: place(rendered, "TRANSFER_EPOCHS", "many")),
    ("secrets", JOB, lambda rendered: place(rendered, "GOOGLE_TOKEN", "ya29.c.b0AXv0zTPQ")),
    ("secrets", JOB, change("container/env/0", {"name": "X", "value": "-----BEGIN PRIVATE KEY-----"})),
    ("security", JOB, lambda rendered: rendered.of("Namespace")[0]["metadata"].update(labels={})),
    ("security", JOB, change("pod/securityContext/runAsNonRoot")),
    ("security", JOB, change("pod/securityContext/runAsUser", 1000)),
    ("security", JOB, change("pod/securityContext/runAsGroup", 0)),
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
    ("selectors", JOB, change("job/template/metadata/labels/app.kubernetes.io~instance", "another")),
    ("selectors", SET, lambda rendered: rendered.objects.remove(rendered.named("NetworkPolicy", RUN))),
    ("selectors", SET, lambda rendered: among_workers(rendered).update(ports=[{"port": 2222}])),
    ("selectors", SET, lambda rendered: other_runs(rendered)),
    ("egress", JOB, drop("NetworkPolicy")),
    ("egress", JOB, lambda rendered: allow(rendered, {"ipBlock": {"cidr": "0.0.0.0/0"}}, 443)),
    ("egress", JOB, lambda rendered: allow(rendered, {"ipBlock": {"cidr": "169.254.0.0/16"}}, 80)),
    ("egress", JOB, lambda rendered: allow(rendered, {"namespaceSelector": {}}, 53)),
    ("egress", JOB, lambda rendered: rendered.named("NetworkPolicy", OUTWARDS)["spec"]["egress"].pop(2)),
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


def among_workers(rendered: Rendered) -> Object:
    found: Object = rendered.named("NetworkPolicy", RUN)["spec"]["ingress"][0]
    return found


def other_runs(rendered: Rendered) -> None:
    (peer,) = among_workers(rendered)["from"]
    del peer["podSelector"]["matchLabels"]["app.kubernetes.io/instance"]


def allow(rendered: Rendered, peer: Object, port: int) -> None:
    rule = {"to": [peer], "ports": [{"port": port, "protocol": "TCP"}]}
    rendered.named("NetworkPolicy", OUTWARDS)["spec"]["egress"].append(rule)


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


@pytest.mark.parametrize("name", ALL)
def test_a_pod_asks_for_its_gpus_and_for_a_node_that_has_them(name: str, folders: dict[str, Path]) -> None:
    rendered = cached(folders[name])
    gpus = None if "cpu" in name else "4" if "multi-gpu" in name else "1"
    assert rendered.container["resources"]["limits"].get("nvidia.com/gpu") == gpus
    assert ("tolerations" in rendered.pod) == (gpus is not None)
    accelerator = rendered.pod.get("nodeSelector", {}).get("cloud.google.com/gke-accelerator")
    assert accelerator == (None if gpus is None else "nvidia-l4")


def test_several_gpus_have_shared_memory(folders: dict[str, Path]) -> None:
    rendered = cached(folders["multi-gpu"])
    (mount,) = (each for each in rendered.container["volumeMounts"] if each["mountPath"] == "/dev/shm")  # noqa: S108
    (volume,) = (each for each in rendered.pod["volumes"] if each["name"] == mount["name"])
    assert volume["emptyDir"]["medium"] == "Memory"
    assert amount(volume["emptyDir"]["sizeLimit"]) > amount("64Mi")


@pytest.mark.parametrize("name", ALL)
def test_a_queue_is_named_and_nothing_is_suspended_which_would_kill_it_when_applied_again(
    name: str, folders: dict[str, Path]
) -> None:
    workload = cached(folders[name]).workload
    queue = workload["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
    assert queue == ("transfer-learning" if "queued" in name else None)
    assert "suspend" not in workload["spec"]


def test_the_queue_covers_all_that_a_pod_asks_for_and_holds_every_overlay(folders: dict[str, Path]) -> None:
    objects = {each["kind"]: each for each in yaml.safe_load_all((FOLDER / "queue.yaml").read_text(encoding="utf-8"))}
    assert set(objects) == {"ResourceFlavor", "ClusterQueue", "LocalQueue"}
    namespace = cached(folders["base"]).of("Namespace")[0]["metadata"]["name"]
    local, cluster = objects["LocalQueue"], objects["ClusterQueue"]
    labels = cached(folders["queued"]).workload["metadata"]["labels"]
    assert local["metadata"] == {"name": labels["kueue.x-k8s.io/queue-name"], "namespace": namespace}
    assert local["spec"]["clusterQueue"] == cluster["metadata"]["name"]
    assert cluster["spec"]["namespaceSelector"] == {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    (group,) = cluster["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    assert flavor["name"] == objects["ResourceFlavor"]["metadata"]["name"]
    quota = {each["name"]: amount(str(each["nominalQuota"])) for each in flavor["resources"]}
    assert list(quota) == group["coveredResources"]
    for name in ALL:
        rendered = cached(folders[name])
        for resource, quantity in rendered.container["resources"]["requests"].items():
            assert rendered.workers * amount(quantity) <= quota[resource], (name, resource)


# What changes the Job, and what makes a JobSet of it or names a queue.
CHANGING = ("gke-spot", "multi-gpu")
ORDERS = [
    order
    for number in range(2, 5)
    for chosen in itertools.combinations((*CHANGING, "multi-worker", "queued"), number)
    for order in itertools.permutations(chosen)
]


@pytest.mark.parametrize("order", ORDERS, ids="+".join)
def test_no_order_of_components_loses_anything_without_a_word(order: tuple[str, ...], tmp_path: Path) -> None:
    need_kubectl()
    folder = combined(tmp_path, order)
    late = [name for name in order if name in CHANGING and "multi-worker" in order[: order.index(name)]]
    if late:
        done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)  # noqa: S607
        assert done.returncode != 0
        assert "no matches for Id Job" in done.stderr
        return
    rendered = build(folder)
    assert rendered.is_set == ("multi-worker" in order)
    assert ("kueue.x-k8s.io/queue-name" in rendered.workload["metadata"]["labels"]) == ("queued" in order)
    assert ("cloud.google.com/gke-spot" in rendered.pod["nodeSelector"]) == ("gke-spot" in order)
    assert any(each["name"] == "shm" for each in rendered.pod["volumes"]) == ("multi-gpu" in order)


def test_two_runs_share_the_namespace_and_nothing_that_either_changes(folders: dict[str, Path]) -> None:
    for name in ("gke-spot", "multi-worker"):
        objects = kustomized(folders[name])
        first, second = (submitted(objects, f"transfer-learning-{number}") for number in (1, 2))
        names = [{(each["kind"], each["metadata"]["name"]) for each in run} for run in (first, second)]
        # named after their content, and the same
        assert {kind for kind, _ in names[0] & names[1]} == {"ConfigMap"}
        assert [each for each in first if each["kind"] == "ConfigMap"] == [
            each for each in second if each["kind"] == "ConfigMap"
        ]
        assert "transfer-learning-1" not in yaml.safe_dump_all(second)


@pytest.mark.parametrize("name", ALL)
def test_a_run_makes_nothing_that_others_need_so_that_its_deletion_takes_nothing_away(
    name: str, folders: dict[str, Path]
) -> None:
    kinds = {each["kind"] for each in kustomized(folders[name])}
    assert kinds <= {"ConfigMap", "Job", "JobSet", "NetworkPolicy", "PersistentVolumeClaim"}
    assert not [words for words in commands("kubectl") if words[1] == "delete" and "--kustomize" in words]
    assert not [words for words in commands("kubectl") if words[1] == "delete" and {"namespace", "all"} & set(words)]


@pytest.mark.parametrize("name", ALL)
def test_a_run_that_was_given_no_name_is_refused(name: str, folders: dict[str, Path]) -> None:
    (workload,) = (each for each in kustomized(folders[name]) if each["kind"] in ("Job", "JobSet"))
    # the API server takes lower-case letters, digits and hyphens
    assert workload["metadata"]["name"] == "${RUN}"


@pytest.mark.parametrize(
    ("file", "opened"),
    [("internet", [("203.0.113.1", 443, "TCP"), ("203.0.113.1", 80, "TCP")]), ("gke-fqdn", []), ("cilium-fqdn", [])],
)
def test_another_way_to_google_is_for_the_jobs_pods_and_no_wider_than_it_says(
    file: str, opened: list[tuple[str, int, str]], folders: dict[str, Path]
) -> None:
    rendered = copy.deepcopy(cached(folders["base"]))
    policy = yaml.safe_load((FOLDER / "network" / f"{file}.yaml").read_text(encoding="utf-8"))
    assert policy["metadata"]["namespace"] == rendered.of("Namespace")[0]["metadata"]["name"]
    spec = policy["spec"]
    selector = spec.get("podSelector", spec.get("endpointSelector"))
    assert selector == rendered.named("NetworkPolicy", OUTWARDS)["spec"]["podSelector"]
    rendered.objects.append(policy)
    if opened:
        assert faults(json.dumps(policy)) == ()
        assert all(reachable(rendered, *place) for place in opened)
        public = {place for place in CLOSED if place[0].startswith(("203.", "199.")) and place[1] != 53}
        assert {place for place in CLOSED if reachable(rendered, *place)} == public
    elif file == "gke-fqdn":
        (rule,) = spec["egress"]
        assert rule == {"matches": [{"pattern": "*.googleapis.com"}], "ports": [{"port": 443, "protocol": "TCP"}]}
    else:
        dns, google = spec["egress"]
        assert dns["toEndpoints"][0]["matchLabels"]["k8s:io.kubernetes.pod.namespace"] == "kube-system"
        assert google["toFQDNs"] == [{"matchPattern": "*.googleapis.com"}]
        assert google["toPorts"] == [{"ports": [{"port": "443", "protocol": "TCP"}]}]


def test_the_reader_may_look_at_the_cpu_overlays_volume(folders: dict[str, Path]) -> None:
    reader, rendered = yaml.safe_load((FOLDER / "reader.yaml").read_text()), cached(folders["cpu"])
    for version in VERSIONS:
        kubernetes_validate.validate(reader, version, strict=True)
    assert list(restricted(reader["spec"])) == []
    assert reader["metadata"]["namespace"] == rendered.of("Namespace")[0]["metadata"]["name"]
    (container,) = reader["spec"]["containers"]
    assert set(container["resources"]["limits"]) == set(container["resources"]["requests"]) == {"cpu", "memory"}
    assert container["image"] == rendered.container["image"]
    assert container["imagePullPolicy"] == rendered.container["imagePullPolicy"]
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


def commands(program: str) -> list[list[str]]:
    """The README's commands of a program, as words; also those inside $( ), in a pipe and in a loop."""
    flat = [re.sub(r"^\w+=\$\((.*)\)$|^until ", r"\1", line) for line in LINES]
    parts = [part for line in flat for part in re.split(r" \| ?|\|$|; ", line)]
    return [words for part in parts if (words := shlex.split(part, comments=True)) and words[0] == program]


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of deploy/ after the README's commands for the place, and with its overlay of one's own."""
    root = tmp_path_factory.mktemp("placed")
    shutil.copytree(ROOT / "deploy", root / "deploy")
    # what the registry would say
    (root / "gcloud").write_text(f"#!/bin/sh\necho {DIGEST}\n")
    (root / "gcloud").chmod(0o755)
    script = "\n".join(blocks("sh")[:2])
    environment = os.environ | {"PATH": f"{root}:{os.environ['PATH']}"}
    subprocess.run(["/bin/bash", "-euc", script], cwd=root, env=environment, check=True)
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
    assert ":DIGEST" not in text
    local = f"{IMAGE}:{VERSION}-cpu"
    assert rendered.container["image"] == (local if name == "cpu" else f"REGISTRY/my-project/{IMAGE}@{DIGEST}")
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


@pytest.mark.parametrize("check", CHECKS)
def test_an_overlay_of_ones_own_is_right(check: str, placed: Path) -> None:
    rendered = cached(placed / "deploy" / "kubernetes" / "overlays" / "mine")
    assert rendered.is_set
    assert len(rendered.pod["nodeSelector"]) == 2
    assert rendered.workload["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    assert list(CHECKS[check](copy.deepcopy(rendered))) == []


def test_the_tables_list_every_folder_and_overlay() -> None:
    listed = re.findall(r"^\| `([a-z-]+)` \|", README, flags=re.MULTILINE)
    assert sorted(listed) == OVERLAYS
    assert sorted(path.parent.name for path in FOLDER.glob("components/*/kustomization.yaml")) == OVERLAYS


def test_the_table_of_exit_codes_says_what_the_manifests_do(folders: dict[str, Path]) -> None:
    rows = re.findall(r"^\| [^|]+ \| (\d+)[^|]* \| ([^|]*) \| ([^|]*) \|$", README, flags=re.MULTILINE)
    assert [row for row in rows if "is no disruption" in row[1]]  # a volume that outgrows its limit
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


def test_the_waits_between_retries_are_those_of_the_job_controller(folders: dict[str, Path]) -> None:
    # pkg/controller/job: 10 s, doubled with each failure in a row, 10 minutes at most
    waits = [min(10 * 2**number, 600) for number in range(cached(folders["base"]).job["backoffLimit"])]
    text = " ".join(README.split())
    assert f"{waits[0]} s after the first failure, {waits[1]} s after the second" in text
    assert f"to {waits[-1]} s after the sixth" in text
    assert "10 s, doubled to 320 s before the sixth" in (FOLDER / "base" / "job.yaml").read_text(encoding="utf-8")


def test_kubectl_knows_the_flags_and_the_files_and_names_are_there(folders: dict[str, Path]) -> None:
    found = commands("kubectl")
    verbs = {"kustomize", "apply", "logs", "wait", "get", "describe", "delete", "cp", "taint"}
    assert {words[1] for words in found} == verbs
    everything = [cached(folders[name]) for name in ALL]
    namespaces = {each.of("Namespace")[0]["metadata"]["name"] for each in everything}
    for words in found:
        check_flags(["kubectl", words[1]], words[2:], ["kubectl", "options"])
        options = dict(itertools.pairwise(words))
        for option in ("--kustomize", "kustomize"):
            if option in options:
                assert ROOT / options[option] in {*folders.values(), FOLDER / "namespace"}
        if options.get("--filename", "-") != "-":
            assert (ROOT / options["--filename"]).is_file()
        if not {"--kustomize", "--filename", "kustomize"} & set(options) and "$NODE" not in words:
            assert {options["--namespace"]} == namespaces
        if "--selector" in options:
            name, _, value = options["--selector"].partition("=")
            values = [each.job["template"]["metadata"]["labels"].get(name) for each in everything]
            assert value.replace("$RUN", RUN) in values or (not value and RUN in values)
        for kind, name in re.findall(r"\b(job|jobset|networkpolicy)/(\S+)", " ".join(words)):
            assert name == "$RUN"
            assert [each for each in everything if any(other["kind"].lower() == kind for other in each.objects)]


def test_every_wait_ends_whatever_the_end_is() -> None:
    """`kubectl wait` for one state hangs where another was first; it is for the reader, which does nothing but wait."""
    assert [words[-1] for words in commands("kubectl") if words[1] == "wait"] == ["pod/reader"]
    assert all("--timeout=5m" in words for words in commands("kubectl") if words[1] == "wait")


def test_the_readmes_name_of_a_run_is_one_that_kubernetes_takes_for_all_that_is_made_of_it() -> None:
    (given,) = {line for line in LINES if line.startswith("RUN=")}
    done = subprocess.run(["/bin/bash", "-euc", f"{given}; echo $RUN"], capture_output=True, text=True, check=True)
    name = done.stdout.strip()
    assert len(name) == len(RUN)
    # a Service's name, the label of a pod's host, and a pod's name with what JobSet and the Job add
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])", name)
    assert "at most 40" in README
    assert max(40, len(name)) + len("-worker-0-99-abcde") <= 63


def test_the_readmes_sed_fills_in_the_name_and_refuses_none() -> None:
    need_kubectl()
    to_the_cluster = " | kubectl apply --filename -"
    submits = [line.removesuffix(to_the_cluster) for line in LINES if line.endswith(to_the_cluster)]
    assert len(submits) == 3
    for line in submits:
        done = subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", f"RUN={RUN}; {line}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        folder = ROOT / shlex.split(line)[2]
        assert list(yaml.safe_load_all(done.stdout)) == submitted(kustomized(folder))
        unset = subprocess.run(["/bin/bash", "-c", line], cwd=ROOT, capture_output=True, text=True, check=False)
        assert unset.returncode != 0
        assert unset.stdout == ""


class Cluster(Handler):
    """As much of an API server as `kubectl get` and `kubectl logs` talk to: each look at the pods is one later."""

    phases: Iterator[str]
    phase: str
    conditions: Iterator[list[str]]
    log: str

    def respond(self) -> None:
        path = urlsplit(self.path).path
        pods, jobs = (
            {"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": ["get", "list"]}
            for name, kind in (("pods", "Pod"), ("jobs", "Job"))
        )
        batch = {"groupVersion": "batch/v1", "version": "v1"}
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", "namespace": "transfer-learning"}}
        pod |= {"spec": {"containers": [{"name": "job"}]}}
        if path.endswith("/log"):
            content = type(self).log.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        elif path.endswith("/pods"):
            assert parse_qs(urlsplit(self.path).query)["labelSelector"] == [f"app.kubernetes.io/instance={RUN}"]
            kind = type(self)
            kind.phase = next(kind.phases, kind.phase)
            items = [pod | {"status": {"phase": kind.phase}}] if kind.phase else []
            self.answer_json(200, {"apiVersion": "v1", "kind": "PodList", "metadata": {}, "items": items})
        elif path.endswith(f"/jobs/{RUN}"):
            status = {"conditions": [{"type": name, "status": "True"} for name in next(type(self).conditions)]}
            self.answer_json(
                200, {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": RUN}, "status": status}
            )
        else:
            answers: dict[str, Object] = {
                "/version": {"major": "1", "minor": "32", "gitVersion": "v1.32.0"},
                "/api": {"kind": "APIVersions", "versions": ["v1"]},
                "/api/v1": {"kind": "APIResourceList", "groupVersion": "v1", "resources": [pods]},
                "/apis": {
                    "kind": "APIGroupList",
                    "groups": [{"name": "batch", "versions": [batch], "preferredVersion": batch}],
                },
                "/apis/batch/v1": {"kind": "APIResourceList", "groupVersion": "batch/v1", "resources": [jobs]},
            }
            self.answer_json(200 if path in answers else 404, answers.get(path, {}))


def follow(commands: str, folder: Path, phases: Sequence[str] = (), conditions: Sequence[list[str]] = ()) -> str:
    """Return what the README's commands print where the pod is one phase after the other (nothing: there is none)."""
    need_kubectl()
    handler = type(
        "Following",
        (Cluster,),
        {"phases": iter(phases), "phase": "", "conditions": iter(conditions), "log": "the whole log\n"},
    )
    with serving(handler) as port:
        config = {"apiVersion": "v1", "kind": "Config", "current-context": "here"}
        config |= {"clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{port}"}}]}
        config |= {"contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}]}
        config |= {"users": [{"name": "me", "user": {}}]}
        (folder / "config").write_text(yaml.safe_dump(config))
        done = subprocess.run(
            ["/bin/bash", "-euo", "pipefail", "-c", f"RUN={RUN}\n{commands.replace('sleep 5', 'sleep 0.01')}"],
            env={"PATH": os.environ["PATH"], "HOME": str(folder), "KUBECONFIG": str(folder / "config")},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def waiting(words: str, text: str = README) -> str:
    """Return the README's commands from the first `until` to the last line with the words, of one block."""
    (found,) = {
        block[block.index("until ") :]
        for block in re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
        if words in block
    }
    return found


@pytest.mark.parametrize(
    "phases",
    [["Running"], ["", "", "Pending", "Running"], ["", "Failed"], ["Pending", "Succeeded"], ["Failed"]],
    ids=lambda phases: "-".join(each or "none" for each in phases),
)
@pytest.mark.parametrize("document", ["guide", "README", "workers"])
def test_the_commands_for_the_log_show_it_whatever_the_pod_has_come_to(
    document: str, phases: list[str], tmp_path: Path
) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8") if document == "README" else README
    commands = waiting("--max-log-requests" if document == "workers" else "overlays/gke-spot", text)
    commands = re.sub(r"\nuntil kubectl get --namespace transfer-learning jobset.*", "", commands, flags=re.DOTALL)
    (waited, log) = follow(commands, tmp_path, phases).split("\n", 1)
    assert waited == phases[-1]
    assert log.endswith("the whole log\n")


@pytest.mark.parametrize("end", ["Complete", "Failed"])
def test_the_command_for_the_end_of_a_run_ends_with_it(end: str, tmp_path: Path) -> None:
    (commands,) = (block for block in blocks("sh") if block.startswith("until kubectl get --namespace"))
    between = {"Complete": "SuccessCriteriaMet", "Failed": "FailureTarget"}[end]
    conditions: list[list[str]] = [[], ["Suspended"], [between], [between, end]]
    assert follow(commands, tmp_path, conditions=conditions) == f"{between} {end}\n"


@pytest.mark.skipif(shutil.which("gcloud") is None, reason="commands are not checked: install the Google Cloud CLI")
@pytest.mark.parametrize("words", commands("gcloud"), ids=lambda words: "-".join(words[1:4]))
def test_gcloud_knows_the_command_and_its_flags(words: list[str], tmp_path: Path) -> None:
    named = ("transfer-learning", "spot-l4", "googleapis", "private")
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


ACCOUNT = "transfer-learning@$PROJECT.iam.gserviceaccount.com"


def test_the_account_has_no_more_than_it_needs() -> None:
    granted = {(words[2], words[4], words[-1]) for words in commands("gcloud") if words[-1].startswith("--role=")}
    assert granted == {
        ("buckets", "gs://$BUCKET", "--role=roles/storage.objectViewer"),
        ("managed-folders", "gs://$BUCKET/runs/", "--role=roles/storage.objectUser"),
        ("service-accounts", ACCOUNT, "--role=roles/iam.workloadIdentityUser"),
    }
    places = (FOLDER / "place" / "place.env").read_text(encoding="utf-8")
    assert "TRANSFER_OUTPUT_URI=gs://BUCKET/runs\n" in places
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
        "grep",
        "kind",
        "kubectl",
        "python",
        "sed",
        "until",
    }
    assert ["python", "-m", "job", "verify"] in [words[:4] for words in commands("python")]
