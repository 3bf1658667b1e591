"""What the README tells a reader to type is parsed and run as written."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from job.settings.environment import load
from tests.measure import scale
from tests.support.real import read_env_file
from tests.support.running import ROOT, Published, run_job

README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = ("deploy/vertex/README.md", "deploy/kubernetes/README.md", "deploy/serving/README.md")
ENV_FILES = sorted(path.stem for path in (ROOT / "deploy" / "env").glob("*.env"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_every_make_target_named_anywhere_exists_and_help_lists_it() -> None:
    documents = [README, (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), (ROOT / ".ci/run").read_text()]
    named = {target for text in documents for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE)}
    assert {"run", "test", "help"} <= named
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: S607
    assert named <= set(re.findall(r"^  ([a-z-]+) ", listed, flags=re.MULTILINE))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(targets) == set(re.findall(r"^  ([a-z-]+) ", listed, flags=re.MULTILINE))


def test_the_settings_of_the_example_are_accepted() -> None:
    exported = dict(word.split("=", 1) for words in commands() if words[0] == "export" for word in words[1:])
    settings = load(exported)
    assert settings.output.output_uri == exported["TRANSFER_OUTPUT_URI"]
    assert len(exported) == 8
    assert (len(settings.training.seeds), len(settings.data.train_fractions)) == (5, 4)


def test_the_commands_for_clouds_and_serving_are_those_that_their_own_guides_have_and_test() -> None:
    guides = "".join((ROOT / path).read_text(encoding="utf-8") for path in GUIDES)
    programs = re.compile(r"^ *(?:gcloud|kubectl|printf|curl) ", re.MULTILINE)
    elsewhere = [block for block in blocks("sh") if programs.search(block)]
    assert len(elsewhere) == 3
    for line in "".join(elsewhere).splitlines():
        assert f"{line}\n" in guides


def test_the_command_for_tensorboard_reads_the_published_logs(published: Published) -> None:
    (words,) = (words for words in commands() if words[0] == "tensorboard")
    assert words[:2] == ["tensorboard", "--logdir"]
    folder = words[2].replace("output/RUN_ID", str(published.folder))
    # --inspect prints what would be shown, instead of showing it
    done = subprocess.run(
        [Path(sys.executable).parent / "tensorboard", "--logdir", folder, "--inspect"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "test/accuracy" in done.stdout
    assert "fine_tune/fraction-1/seed-0" in done.stdout


def test_the_commands_of_the_example_run(published: Published, small: dict[str, str]) -> None:
    verbs = [words[3:] for words in commands() if words[:3] == ["python", "-m", "job"]]
    assert [words[:1] for words in verbs] == [["plan"], [], ["verify"], ["env"]]
    for words in verbs:
        arguments = [str(published.folder) if word.startswith("gs://") else word for word in words]
        done = run_job(small | {"TRANSFER_OUTPUT_URI": str(published.folder.parent)}, *arguments)
        assert done.code == 0, done.errors


def test_the_serving_example_runs(published: Published, tmp_path: Path) -> None:
    import tensorflow as tf

    (example,) = blocks("python")
    (tmp_path / "photo.jpg").write_bytes(tf.io.encode_jpeg(tf.zeros((30, 40, 3), tf.uint8)).numpy())
    (tmp_path / "output").symlink_to(published.folder.parent)
    code = example.replace("RUN_ID", published.folder.name)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert any(name in done.stdout for name in published.manifest["dataset"]["classes"])


def test_the_table_of_scale_is_the_one_that_is_printed() -> None:
    assert scale.table() in README


@pytest.mark.parametrize("name", ENV_FILES)
def test_every_env_file_is_accepted(name: str) -> None:
    values = read_env_file(name)
    assert values
    load(values)
    for line in (ROOT / "deploy" / "env" / f"{name}.env").read_text().splitlines():
        # docker --env-file takes quotes and blanks as part of the value, a shell does not
        assert not re.search(r"['\" ]", line) or line.startswith("#")


@pytest.mark.slow
def test_make_run_ends_in_a_published_run_in_a_fresh_clone(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)  # noqa: S607
    done = subprocess.run(["make", "run"], cwd=clone, capture_output=True, text=True, check=False)  # noqa: S607
    assert done.returncode == 0, done.stdout + done.stderr
    (manifest,) = clone.glob("output/*/manifest.json")
    assert len(list(manifest.parent.glob("arms/*/fraction-1/seed-0/saved_model/saved_model.pb"))) == 3
    assert "test accuracy" in done.stdout
