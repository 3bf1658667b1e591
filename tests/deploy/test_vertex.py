"""The specs for Vertex AI, and the commands that their README gives, without a cloud."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any

import pytest
import yaml

from job.settings import cluster
from job.settings.environment import load
from tests.support.real import read_env_file
from tests.support.running import ROOT
from tests.support.servers import Handler, serving

FOLDER = ROOT / "deploy" / "vertex"
SPECS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
README = (FOLDER / "README.md").read_text(encoding="utf-8")

# What the user sets, and the spec leaves open.
USER = {
    "IMAGE": "host.example/project/repository/transfer-learning-job",
    "DIGEST": "sha256:" + "0123456789abcdef" * 4,
    "BUCKET": "some-bucket",
    "SERVICE_ACCOUNT": "transfer-learning-job@project.iam.gserviceaccount.com",
}
PLACES = {"TRANSFER_DATA_DIR": "gs://some-bucket/tfds", "TRANSFER_OUTPUT_URI": "gs://some-bucket/runs"}

# Vertex AI documentation, "Configure compute resources for training", table "Valid numbers of GPUs for each machine
# type" (cloud.google.com/vertex-ai/docs/training/configure-compute#gpu-compatibility-table), of N1 those with T4.
GPUS = {
    **{(f"g2-standard-{cpus}", "NVIDIA_L4"): {1} for cpus in (4, 8, 12, 16, 32)},
    ("g2-standard-24", "NVIDIA_L4"): {2},
    ("g2-standard-48", "NVIDIA_L4"): {4},
    ("g2-standard-96", "NVIDIA_L4"): {8},
    **{(f"n1-standard-{cpus}", "NVIDIA_TESLA_T4"): {1, 2, 4} for cpus in (4, 8, 16)},
    ("n1-standard-32", "NVIDIA_TESLA_T4"): {2, 4},
    **{(f"n1-standard-{cpus}", "NVIDIA_TESLA_T4"): {4} for cpus in (64, 96)},
    **{(f"a2-highgpu-{count}g", "NVIDIA_TESLA_A100"): {count} for count in (1, 2, 4, 8)},
    ("a2-megagpu-16g", "NVIDIA_TESLA_A100"): {16},
    **{(f"a2-ultragpu-{count}g", "NVIDIA_A100_80GB"): {count} for count in (1, 2, 4, 8)},
    **{(f"a3-highgpu-{count}g", "NVIDIA_H100_80GB"): {count} for count in (1, 2, 4, 8)},
    ("a3-megagpu-8g", "NVIDIA_H100_MEGA_80GB"): {8},
    ("a3-ultragpu-8g", "NVIDIA_H200_141GB"): {8},
    ("a4-highgpu-8g", "NVIDIA_B200"): {8},
}
EXAMPLES = {"cats_vs_dogs": 23_262, "tf_flowers": 3_670}
IMAGE_GB = 20  # the image with CUDA's libraries, unpacked, and the machine's own system


def text_of(name: str) -> str:
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def job_of(name: str) -> dict[str, Any]:
    """Return the spec's document, a CustomJob, with the user's names filled in."""
    return dict(yaml.safe_load(Template(text_of(name)).substitute(USER)))


def spec_of(name: str) -> dict[str, Any]:
    return dict(job_of(name)["jobSpec"])


def preset_of(name: str) -> str:
    """Return the one preset that the spec says it holds."""
    (preset,) = set(re.findall(r"deploy/env/([\w-]+)\.env", text_of(name)))
    return str(preset)


def environment_of(pool: dict[str, Any]) -> dict[str, str]:
    entries = [(entry["name"], entry["value"]) for entry in pool["containerSpec"]["env"]]
    assert len(dict(entries)) == len(entries), "a variable is set twice"
    return dict(entries)


def parse(document: dict[str, Any]) -> Any:
    """Return the CustomJob that a document in JSON form describes; ParseError where it describes none."""
    from google.cloud.aiplatform_v1 import CustomJob
    from google.protobuf import json_format

    return CustomJob(json_format.ParseDict(document, CustomJob()._pb, ignore_unknown_fields=False))


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys_of(inner)


def seconds(duration: str) -> int:
    return int(duration.removesuffix("s"))


# --- the specs ---------------------------------------------------------------------------------------------------


def test_there_is_a_spec_for_one_gpu_spot_several_gpus_and_several_workers() -> None:
    assert SPECS == ["multi-gpu", "multi-worker", "one-gpu", "spot"]
    assert all(f"`{name}.yaml`" in README for name in SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_is_as_it_lies_there_a_custom_job_without_unknown_fields(name: str) -> None:
    document = yaml.safe_load(text_of(name))
    job = parse(document)
    assert job.display_name == f"transfer-learning-{name}"
    assert dict(job.labels) == {"app": "transfer-learning-job"}
    assert len(job.job_spec.worker_pool_specs) == len(document["jobSpec"]["workerPoolSpecs"])
    # protobuf takes machine_type for machineType, gcloud drops it
    assert not [key for key in keys_of(document) if "_" in key]


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("machineType", "machineTyp"),
        ("strategy: SPOT", "strategy: SPOTT"),
        ("NVIDIA_L4", "NVIDIA_L5"),
        ("timeout", "maxRunTime"),
        ('value: "15"', "value: 15"),
        ("serviceAccount", "metadata"),
        ("displayName", "title"),
        ("jobSpec:", "spec:"),
        ("app: transfer-learning-job", "app: 1"),
    ],
)
def test_a_slip_in_a_spec_is_refused(right: str, wrong: str) -> None:
    from google.protobuf.json_format import ParseError

    text = Template(text_of("spot")).substitute(USER)
    assert right in text
    with pytest.raises(ParseError):
        parse(yaml.safe_load(re.sub(f"(?m)^([^#\n]*){re.escape(right)}", rf"\g<1>{wrong}", text)))


@pytest.mark.parametrize("name", SPECS)
def test_a_bare_job_spec_is_no_custom_job(name: str) -> None:
    from google.protobuf.json_format import ParseError

    with pytest.raises(ParseError):
        parse(spec_of(name))


@pytest.mark.parametrize("name", SPECS)
def test_the_user_sets_image_digest_bucket_and_service_account_and_nothing_else(name: str) -> None:
    text = text_of(name)
    assert set(re.findall(r"\$\{?(\w+)", text)) == set(USER)
    document = yaml.safe_load(text)["jobSpec"]
    assert {pool["containerSpec"]["imageUri"] for pool in document["workerPoolSpecs"]} == {"${IMAGE}@${DIGEST}"}
    # an account of its own: the default one reads and writes every bucket of the project
    assert document["serviceAccount"] == "${SERVICE_ACCOUNT}"


@pytest.mark.parametrize("name", SPECS)
def test_machine_and_accelerators_go_together(name: str) -> None:
    for pool in spec_of(name)["workerPoolSpecs"]:
        machine = pool["machineSpec"]
        assert machine["acceleratorCount"] in GPUS[machine["machineType"], machine["acceleratorType"]]


def test_the_table_of_accelerators_names_what_the_api_knows() -> None:
    from google.cloud.aiplatform_v1.types import AcceleratorType

    assert {accelerator for _, accelerator in GPUS} <= set(AcceleratorType.__members__)


@pytest.mark.parametrize("name", SPECS)
def test_the_number_of_machines_and_gpus_is_what_the_name_says(name: str) -> None:
    pools = spec_of(name)["workerPoolSpecs"]
    # Vertex AI: exactly one primary replica, alone in pool 0
    assert pools[0]["replicaCount"] == 1
    assert len(pools) == (2 if name == "multi-worker" else 1)
    assert all(pool["replicaCount"] >= 1 for pool in pools)
    assert pools[0]["machineSpec"]["acceleratorCount"] == (2 if name == "multi-gpu" else 1)
    alike = [{key: value for key, value in pool.items() if key != "replicaCount"} for pool in pools]
    assert all(pool == alike[0] for pool in alike)


@pytest.mark.parametrize("name", SPECS)
def test_scheduling_restarts_where_a_worker_can_be_lost_and_ends_what_hangs(name: str) -> None:
    scheduling = spec_of(name)["scheduling"]
    assert scheduling.get("strategy") == ("SPOT" if name == "spot" else None)
    assert scheduling.get("restartJobOnWorkerRestart", False) == (name in {"spot", "multi-worker"})
    assert 0 < seconds(scheduling["timeout"]) < 7 * 24 * 3600  # the default, and FLEX_START's limit, is a week
    assert "maxWaitDuration" not in scheduling  # only with FLEX_START
    assert "disableRetries" not in scheduling  # overrides restartJobOnWorkerRestart


@pytest.mark.parametrize("name", SPECS)
def test_the_boot_disk_holds_the_image_and_the_rows(name: str) -> None:
    for pool in spec_of(name)["workerPoolSpecs"]:
        environment = environment_of(pool)
        pixels = 3 * int(environment["TRANSFER_IMAGE_SIZE"]) ** 2 * EXAMPLES[environment["TRANSFER_DATASET"]]
        # besides pixels: the rows of fine_tune's tail and of the heads, which are no larger, and what is published
        needed = IMAGE_GB + 3 * pixels / 1e9
        # Vertex AI takes 100 to 64,000 GB
        assert max(100, needed) <= pool["diskSpec"]["bootDiskSizeGb"] <= 64_000
        assert pool["diskSpec"]["bootDiskType"] in {"pd-ssd", "pd-standard"}


# --- the settings ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPECS)
def test_the_settings_are_the_presets_and_the_places(name: str) -> None:
    expected = read_env_file(preset_of(name)) | PLACES
    for pool in spec_of(name)["workerPoolSpecs"]:
        assert environment_of(pool) == expected, f"deploy/env/{preset_of(name)}.env and {name}.yaml differ"


@pytest.mark.parametrize("name", SPECS)
def test_a_base_directory_belongs_to_a_preset_so_that_another_spec_can_finish_its_run(name: str) -> None:
    prefix = spec_of(name)["baseOutputDirectory"]["outputUriPrefix"]
    assert prefix == f"gs://some-bucket/vertex/{preset_of(name)}"


def tf_config(pools: list[dict[str, Any]], pool: int, index: int) -> str:
    """Return TF_CONFIG as Vertex AI sets it (documentation, "Distributed training"), with all that it adds."""
    kinds = ("chief", "worker")[: len(pools)]
    jobs = {
        kind: [f"training-workerpool{number}-0a1b2c-{replica}:2222" for replica in range(pools[number]["replicaCount"])]
        for number, kind in enumerate(kinds)
    }
    task = {"type": kinds[pool], "index": index, "cloud": "0a1b2c"}
    return json.dumps({"cluster": jobs, "environment": "cloud", "job": {"workerPoolSpecs": pools}, "task": task})


@pytest.mark.parametrize("name", SPECS)
def test_the_settings_are_accepted_with_what_vertex_ai_adds(name: str) -> None:
    document = spec_of(name)
    pools = document["workerPoolSpecs"]
    base = document["baseOutputDirectory"]["outputUriPrefix"]
    added = {
        "AIP_MODEL_DIR": f"{base}/model/",
        "AIP_CHECKPOINT_DIR": f"{base}/checkpoints/",
        "AIP_TENSORBOARD_LOG_DIR": f"{base}/logs/",
        "AIP_TF_PROFILER_PORT": "6009",
        "CLOUD_ML_JOB_ID": "123",
        "CLUSTER_SPEC": "{}",
    }
    tasks = [(number, index) for number, pool in enumerate(pools) for index in range(pool["replicaCount"])]
    for tf in [{"TF_CONFIG": tf_config(pools, *task)} for task in tasks] + [{}]:
        settings = load(environment_of(pools[0]) | added | tf)
        assert settings.output.output_uri == "gs://some-bucket/runs"
        assert settings.platform.checkpoint_dir == f"{base}/checkpoints/"


def test_pool_0_is_the_chief_and_alone_it_is_no_cluster() -> None:
    pools = spec_of("multi-worker")["workerPoolSpecs"]
    pools[1]["replicaCount"] = 3
    found = [cluster.parse(tf_config(pools, *task)) for task in ((0, 0), (1, 0), (1, 1), (1, 2))]
    assert [worker.index for worker in found if worker] == [0, 1, 2, 3]
    # the documentation says that one machine gets no TF_CONFIG; logs of such jobs show a cluster of one chief
    assert cluster.parse(tf_config(spec_of("one-gpu")["workerPoolSpecs"], 0, 0)) is None


# --- the commands ------------------------------------------------------------------------------------------------


def blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def block_with(words: str) -> str:
    (block,) = [block for block in blocks() if words in block]
    return block


SUBMIT = block_with("SPEC=one-gpu")


def gcloud_commands() -> list[list[str]]:
    """Return the words of every gcloud command, also of those in a pipe or in $(...)."""
    lines = re.sub(r"\\\n", " ", "".join(blocks())).splitlines()
    found = [command for line in lines for command in re.findall(r"\bgcloud ([^|]*)", line)]
    return [shlex.split(re.sub(r"\)$", "", command), comments=True) for command in found]


def bash(command: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run what the README gives, in the repository's root, which must succeed; ``environment`` None: in our own."""
    words = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def sdk() -> Path:
    """Return the folder of the Google Cloud SDK, or skip the test aloud."""
    program = shutil.which("gcloud")
    if program is None:
        pytest.skip("gcloud is not here: install the Google Cloud CLI (cloud.google.com/sdk)")
    return Path(program).resolve().parent.parent


def test_every_gcloud_command_and_flag_exists() -> None:
    table = sdk() / "data" / "cli" / "gcloud_completions.py"
    if not table.exists():
        pytest.skip(f"{table} is not there: install the Google Cloud CLI as Google packages it")
    tree = runpy.run_path(str(table))["STATIC_COMPLETION_CLI_TREE"]
    commands = gcloud_commands()
    assert len(commands) > 20
    for words in commands:
        place, known, path = tree, set(tree["flags"]), []
        while words and words[0] in place["commands"]:
            place = place["commands"][words[0]]
            known |= set(place["flags"])
            path.append(words.pop(0))
        assert not place["commands"], f"gcloud {' '.join(path)} is a group of commands, {words[:1]} is none of them"
        flags = {word.split("=")[0] for word in words if word.startswith("--")}
        assert flags <= known, f"gcloud {' '.join(path)}: {sorted(flags - known)}"


def test_every_role_that_is_granted_is_explained_and_the_other_way_round() -> None:
    (explained,) = re.findall(r"^\| who \|.*?\n\n", README, flags=re.MULTILINE | re.DOTALL)
    granted = {role for words in gcloud_commands() for role in re.findall(r"--role=(\S+)", " ".join(words))}
    own = {role.rsplit("/", 1)[1] for role in granted if role.startswith("projects/")}
    named = {role for role in granted if role.startswith("roles/")}
    assert own == {"transferJobSubmitter"}
    assert "`transferJobSubmitter`" in explained
    assert set(re.findall(r"`(roles/[\w.]+)`", explained)) == named
    assert not re.findall(r"roles/(?:owner|editor|\w+\.admin)\b", README)


def test_the_jobs_account_writes_to_the_folders_of_the_specs_and_reads_the_rest_of_the_bucket() -> None:
    bindings = [words for words in gcloud_commands() if "--member=serviceAccount:$SERVICE_ACCOUNT" in words]
    granted = [(words[1], words[3], words[-1].removeprefix("--role=roles/storage.")) for words in bindings]
    assert granted == [
        ("buckets", "gs://$BUCKET", "objectViewer"),
        ("managed-folders", "gs://$BUCKET/runs/", "objectUser"),
        ("managed-folders", "gs://$BUCKET/vertex/", "objectUser"),
    ]
    bucket = f"gs://{USER['BUCKET']}"
    for name in SPECS:
        document = spec_of(name)
        assert document["baseOutputDirectory"]["outputUriPrefix"].startswith(f"{bucket}/vertex/")
        assert environment_of(document["workerPoolSpecs"][0])["TRANSFER_OUTPUT_URI"] == f"{bucket}/runs"


def test_variables_are_set_before_they_are_used() -> None:
    known: set[str] = set()
    for line in re.sub(r"\\\n", " ", "".join(blocks())).splitlines():
        used = set(re.findall(r"(?<!\\)\$\{?([A-Z_]+)", line))
        assert used <= known, line
        known |= set(re.findall(r"^(?:export )?([A-Z_]+)=", line))
    assert set(USER) <= known


def test_the_awk_of_the_readme_prints_what_the_specs_hold() -> None:
    command = block_with("awk").strip()
    for name in SPECS:
        done = bash(command.replace("article.env", f"{preset_of(name)}.env"))
        assert done.stdout.startswith("          - name: TRANSFER_DATASET\n")
        assert f"\n{done.stdout}" in text_of(name)


@pytest.mark.parametrize("name", SPECS)
def test_what_the_awk_of_the_readme_prints_takes_the_place_of_a_specs_preset(name: str) -> None:
    command = block_with("awk").strip()
    old = bash(command.replace("article.env", f"{preset_of(name)}.env")).stdout
    other = "flowers-xception" if preset_of(name) == "article" else "article"
    new = bash(command.replace("article.env", f"{other}.env")).stdout
    assert old.count("\n") > 20
    assert old != new
    document = yaml.safe_load(Template(text_of(name).replace(old, new)).substitute(USER))
    parse(document)
    for pool in document["jobSpec"]["workerPoolSpecs"]:
        assert environment_of(pool) == read_env_file(other) | PLACES


def test_the_image_is_named_as_everywhere_with_the_version_of_the_project() -> None:
    version = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert re.findall(r"(?:transfer-learning-job|\$IMAGE):([\w.]+)", README) == version * 4


@contextmanager
def vertex() -> Iterator[tuple[int, list[tuple[str, dict[str, Any]]]]]:
    """Take custom jobs as Vertex AI does; yield the port, and the jobs with the path that they were sent to."""
    jobs: list[tuple[str, dict[str, Any]]] = []

    class Front(Handler):
        def respond(self) -> None:
            job = json.loads(self.content())
            jobs.append((self.path, job))
            self.answer_json(200, job | {"name": "projects/1/locations/us-central1/customJobs/7"})

    with serving(Front) as port:
        yield port, jobs


@pytest.mark.parametrize("name", SPECS)
def test_the_readmes_sed_gives_gcloud_the_job_spec_and_nothing_else(name: str) -> None:
    command, _ = SUBMIT.replace("SPEC=one-gpu", f"SPEC={name}").split("|\n  gcloud")
    done = bash(command, USER | {"PATH": os.environ["PATH"]})
    assert yaml.safe_load(done.stdout) == spec_of(name)


@pytest.mark.parametrize("name", SPECS)
def test_the_readmes_command_submits_all_of_a_spec(name: str, tmp_path: Path) -> None:
    job = submit(SUBMIT.replace("SPEC=one-gpu", f"SPEC={name}"), tmp_path)
    # nothing dropped, nothing added: gcloud ignores what it does not know
    assert parse(job) == parse(job_of(name))


def with_options(name: str) -> dict[str, Any]:
    """Return a spec with the README's key, network and labels in it."""
    (options,) = (
        yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    )
    return job_of(name) | options | {"jobSpec": spec_of(name) | options["jobSpec"]}


@pytest.mark.parametrize("name", SPECS)
def test_a_key_a_network_and_labels_of_ones_own_are_fields_of_a_custom_job(name: str) -> None:
    job = parse(with_options(name))
    assert job.encryption_spec.kms_key_name.endswith("/keyRings/my-ring/cryptoKeys/my-key")
    assert job.job_spec.network.endswith("/global/networks/my-network")
    assert dict(job.labels) == {"app": "transfer-learning-job", "team": "my-team"}


@pytest.mark.parametrize("name", SPECS)
def test_the_readmes_flags_submit_a_key_a_network_and_labels_as_a_spec_has_them(name: str, tmp_path: Path) -> None:
    job = submit(
        block_with("--network="),
        tmp_path,
        SPEC=name,
        NUMBER="123456789012",
        KEY="projects/my-project/locations/us-central1/keyRings/my-ring/cryptoKeys/my-key",
    )
    assert parse(job) == parse(with_options(name))


def test_the_readmes_key_is_a_whole_name_where_the_job_runs() -> None:
    (line,) = (line for block in blocks() for line in block.splitlines() if line.startswith("KEY="))
    key = Template(line.removeprefix("KEY=")).substitute(PROJECT="my-project", REGION="us-central1")
    assert key == with_options("one-gpu")["encryptionSpec"]["kmsKeyName"]


def submit(command: str, tmp_path: Path, **environment: str) -> dict[str, Any]:
    """Run one of the README's commands; return the one job that Vertex AI received."""
    sdk()
    (tmp_path / "token").write_text("none")
    with vertex() as (port, jobs):
        environment |= USER | {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "REGION": "us-central1",
            "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
            "CLOUDSDK_CORE_PROJECT": "project",
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
            "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
            "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
            "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(tmp_path / "token"),
            "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": f"http://127.0.0.1:{port}/",
        }
        bash(command, environment)
    ((path, job),) = jobs
    assert path.startswith("/v1/projects/project/locations/us-central1/customJobs")
    return job
