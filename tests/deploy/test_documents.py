"""What the documents tell a reader to type is parsed and run as written; their links and paths lead somewhere."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from job.settings.environment import load
from tests.measure import scale
from tests.support.real import read_env_file
from tests.support.running import ROOT, Published, run_job

# Documents whose commands are held here; those of the guides are by tests of their own.
TYPED = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
GUIDES = ("deploy/vertex/README.md", "deploy/kubernetes/README.md", "deploy/serving/README.md")
DOCUMENTS = (*TYPED, "ARCHITECTURE.md", "CHANGELOG.md", "tests/measure/README.md", *GUIDES)
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in DOCUMENTS}
MEASURES = "tests/measure/README.md"
ENV_FILES = sorted(path.stem for path in (ROOT / "deploy" / "env").glob("*.env"))
PYTHON = ("python", ".venv/bin/python")
# Blocks with these are taken as a whole from a guide.
ELSEWHERE = re.compile(r"^ *(?:gcloud|kubectl|printf|curl) ", re.MULTILINE)


def blocks(name: str, language: str = "sh") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[name], flags=re.MULTILINE | re.DOTALL)


def commands(name: str) -> list[list[str]]:
    """Return the commands of a document as words, without those that are taken from a guide."""
    own = [block for block in blocks(name) if not ELSEWHERE.search(block)]
    lines = [line for block in own for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def all_commands() -> list[list[str]]:
    return [words for name in TYPED for words in commands(name)]


def module_of(words: list[str]) -> str:
    """Return what ``python -m`` is to run, else nothing."""
    return words[2] if words[0] in PYTHON and words[1:2] == ["-m"] else ""


def prose(name: str) -> str:
    """Return a document without its blocks."""
    return re.sub(r"^```.*?^```", "", TEXTS[name], flags=re.MULTILINE | re.DOTALL)


def anchors(name: str) -> set[str]:
    """Return what a link to a heading of the document may say after its ``#``."""
    headings = re.findall(r"^#+ (.+)$", prose(name), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- commands ----------------------------------------------------------------------------------------------------


def test_every_make_target_named_anywhere_exists_and_help_lists_it() -> None:
    texts = [*TEXTS.values(), (ROOT / ".ci/run").read_text()]
    named = {target for text in texts for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE)}
    assert {"run", "test", "help", "install", "bench"} <= named
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: S607
    assert named <= set(re.findall(r"^  ([a-z-]+) ", listed, flags=re.MULTILINE))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(targets) == set(re.findall(r"^  ([a-z-]+) ", listed, flags=re.MULTILINE))


def test_every_command_is_of_a_kind_that_is_held_here() -> None:
    """A command of another kind wants a test of its own first."""
    for words in all_commands():
        known = words[0] in ("make", "export", "tensorboard") or words == [".venv/bin/pre-commit", "install"]
        module = module_of(words)
        known |= module in ("job", "pytest") or module.startswith("tests.measure.")
        known |= words[1:] == ["-m", "pip", "install", "pre-commit"]
        assert known, words


def test_the_settings_of_the_examples_are_accepted() -> None:
    for name in TYPED:
        load(exported(name))
    given = exported("README.md")
    settings = load(given)
    assert settings.output.output_uri == given["TRANSFER_OUTPUT_URI"]
    assert len(given) == 8
    assert (len(settings.training.seeds), len(settings.data.train_fractions)) == (5, 4)


def exported(name: str) -> dict[str, str]:
    return dict(word.split("=", 1) for words in commands(name) if words[0] == "export" for word in words[1:])


def test_the_commands_for_clouds_and_serving_are_those_that_their_own_guides_have_and_test() -> None:
    guides = "".join(TEXTS[path] for path in GUIDES)
    elsewhere = [block for name in TYPED for block in blocks(name) if ELSEWHERE.search(block)]
    assert len(elsewhere) >= 3
    for line in "".join(elsewhere).splitlines():
        assert f"{line}\n" in guides


def test_the_commands_for_tensorboard_read_the_published_logs(published: Published) -> None:
    told = [words for words in all_commands() if words[0] == "tensorboard"]
    assert told
    for words in told:
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


def test_the_commands_of_the_examples_run(published: Published, small: dict[str, str]) -> None:
    verbs = [tuple(words[3:]) for words in all_commands() if module_of(words) == "job"]
    assert {words[:1] for words in verbs} == {("plan",), (), ("verify",), ("env",)}
    for words in dict.fromkeys(verbs):
        arguments = [str(published.folder) if word.startswith("gs://") else word for word in words]
        done = run_job(small | {"TRANSFER_OUTPUT_URI": str(published.folder.parent)}, *arguments)
        assert done.code == 0, done.errors


def test_the_serving_example_runs(published: Published, tmp_path: Path) -> None:
    import tensorflow as tf

    (example,) = (block for name in TYPED for block in blocks(name, "python"))
    (tmp_path / "photo.jpg").write_bytes(tf.io.encode_jpeg(tf.zeros((30, 40, 3), tf.uint8)).numpy())
    (tmp_path / "output").symlink_to(published.folder.parent)
    code = example.replace("RUN_ID", published.folder.name)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert any(name in done.stdout for name in published.manifest["dataset"]["classes"])


@pytest.mark.parametrize("name", DOCUMENTS)
def test_modules_that_are_to_be_run_exist(name: str) -> None:
    for module in re.findall(r"python -m (tests[\w.]*\w)", TEXTS[name]):
        assert importlib.util.find_spec(module), module
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_hooks_for_commits_run_the_programs_of_make_lint_and_fetch_nothing() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [place["repo"] for place in hooks] == ["local"]
    entries = [hook["entry"].replace("--force-exclude", "").split() for hook in hooks[0]["hooks"]]
    assert {hook["language"] for hook in hooks[0]["hooks"]} == {"system"}
    (recipe,) = re.findall(r"^lint: install .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    lint = [line.replace("$(BIN)", ".venv/bin").split() for line in recipe.splitlines()]
    assert entries == [[word for word in words if word not in (".", "--check")] for words in lint]


# --- links and paths ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_relative_link_leads_to_a_file_and_a_heading_in_it(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(name)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, heading = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if heading:
            place = target.resolve().relative_to(ROOT.resolve()).as_posix()
            assert heading in anchors(place), link


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_python_file_that_is_named_exists(name: str) -> None:
    folders = [ROOT / top for top in ("job", "tests", "docker", "deploy")]
    there = [f"/{path.relative_to(ROOT).as_posix()}" for folder in folders for path in folder.rglob("*.py")]
    for path in re.findall(r"(?<![\w/.*-])(?:job|tests)/[\w/-]*\w\.py\b", TEXTS[name]):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"`([\w/]*\w\.py)`", TEXTS[name]):
        assert any(known.endswith(f"/{path}") for known in there), path


def test_every_page_of_docs_is_linked_from_the_readme_and_begins_with_a_sentence() -> None:
    for name in TYPED:
        title, blank, sentence, *_ = TEXTS[name].splitlines()
        assert title.startswith("# ")
        assert not blank
        assert re.match(r"[\w`]", sentence), name
        assert name == "README.md" or f"({name})" in TEXTS["README.md"]


def test_the_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 220


# --- tables ------------------------------------------------------------------------------------------------------


def test_every_program_that_measures_has_a_row_and_every_row_a_program() -> None:
    programs = {path.stem for path in (ROOT / "tests" / "measure").glob("*.py")}
    programs = {name for name in programs if not name.startswith(("test_", "__"))}
    rows = re.findall(r"^\| `(\w+)` \|(.+)\|$", TEXTS[MEASURES], flags=re.MULTILINE)
    assert {name for name, _ in rows} == programs
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name, row in rows:
        what, command, takes, figures = (cell.strip() for cell in row.split("|"))
        assert all((what, takes, figures)), name
        if target := re.fullmatch(r"`make ([a-z-]+)`", command):
            assert re.search(rf"^{target[1]}: .*\n\t.* -m tests\.measure\.{name}\b", makefile, flags=re.MULTILINE)
        else:
            assert re.fullmatch(rf"`python -m tests\.measure\.{name}(?: \w+)*`", command), command


def test_the_table_of_scale_is_the_one_that_is_printed() -> None:
    assert scale.table() in TEXTS["docs/scale.md"]


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
