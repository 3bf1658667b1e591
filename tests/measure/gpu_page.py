"""The page of the GPU acceptance run: what falls short of which goal, in words, and the tables.

    python -m tests.measure.gpu_page FOLDER    writes FOLDER/gpu_acceptance.md anew from the JSON beside it

Every table says in its title where it is of a CPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.measure.gpu_data import write_json
from tests.measure.gpu_goals import (
    ARMS,
    JSON,
    KINDS,
    TIMES_KERAS,
    Found,
    fastest,
    judged_anew,
    linear_share,
    off_and_accepted,
    seconds_of_arm,
    shortfalls_of,
    status,
    times_keras,
)

PAGE = "gpu_acceptance.md"
ON_CPU = "this is the CPU and no result of a GPU"


def page(report: Found) -> str:
    """Return the whole report as Markdown."""
    parts = report["parts"]
    lines = [f"# {report['title']}", "", _summary(report), ""]
    lines += [f"- {name}: **{KINDS[each.kind]}**: {each.text}" for name, each in shortfalls_of(report)] or [
        "Nothing falls short." if report["finished"] else "Nothing falls short so far."
    ]
    rows = [[name, status(part), _number(part.get("seconds"), "{:.0f}")] for name, part in parts.items()]
    lines += _table("Parts", ["part", "how it ended", "seconds"], rows, report)
    for name, part in parts.items():
        if part.get("found") and name in _TABLES:
            lines += _TABLES[name](part["found"], report)
    for name, part in parts.items():
        if part.get("output"):
            lines += ["", f"Last lines of {name}:", "", "```text", *part["output"], "```"]
    return "\n".join(lines) + "\n"


def _summary(report: Found) -> str:
    states = [status(part) for part in report["parts"].values()]
    counted = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    said = f"{len(states)} parts: {counted}. "
    if not report["finished"]:
        said += "The run has not ended, or was killed. "
    if report["not_asked_for"]:
        said += f"Not asked for: {', '.join(report['not_asked_for'])}. "
    if report["cpu"]:
        said += "Speeds are shown and not judged. "
    data = (report["parts"].get("data") or {}).get("found")
    if data:
        said += f"Photos: {data['photos']}, and {data['generated']['photos']:,} generated ones. "
        said += f"Weights: {data['weights']}. "
    return f"{said}{report['spent']:.0f} of {report['seconds']:.0f} s, begun {report['begun']}."


def _table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], report: Found) -> list[str]:
    if report["cpu"]:
        caption += f" ({ON_CPU})"
    body = [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]
    return ["", f"**{caption}**", "", *body]


def _number(value: float | None, form: str = "{:,.0f}") -> str:
    return "" if value is None else form.format(value)


def _gigabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e9:.1f}"


def _machine_table(found: Found, report: Found) -> list[str]:
    nvml = found.get("nvml", ())
    rows = [
        ["GPUs", "; ".join(f"{each['name']}, {each['memory'] / 1e9:.0f} GB" for each in nvml) or "none"],
        ["compute capability", ", ".join(each["compute_capability"] for each in found["gpus"])],
        ["driver", f"{found['driver']}, CUDA {found.get('driver_cuda')}"],
        ["TensorFlow", f"{found['tensorflow']}, built for CUDA {found['cuda']} and cuDNN {found['cudnn']}"],
        ["CPU", f"{found['cores']} cores, {found['memory'] / 1e9:.0f} GB"],
    ]
    return _table("The machine", ["what", "found"], rows, report)


def _precision(run: Found) -> str:
    return f"{run['precision']} (TF32)" if run["tf32"] else str(run["precision"])


_SECONDS = ("data", "features", "training", "evaluation", "export", "total")


def _runs_table(caption: str, runs: Mapping[str, Found], report: Found) -> list[str]:
    rows = [
        [
            *(name, _precision(run), "on" if run["xla"] else "off", arm),
            f"{result['accuracy']:.3f} ({result['interval'][0]:.3f} - {result['interval'][1]:.3f})",
            *(_number(result["seconds"][each], "{:.1f}") for each in _SECONDS),
            _number(result["examples_per_second"]),
        ]
        for name, run in runs.items()
        for arm, result in run["arms"].items()
    ]
    columns = ["run", "precision", "XLA", "arm", "test accuracy", *(f"{each}, s" for each in _SECONDS), "images/s"]
    return _table(caption, columns, rows, report)


def _repeats_table(caption: str, found: Found, report: Found) -> list[str]:
    rows = [[f"{found['compared']}", f"{len(found['differing'])}", ", ".join(found["further"])]]
    return _table(caption, ["files compared", "that differ", "further differences of the manifests"], rows, report)


def _serve_table(found: Found, report: Found) -> list[str]:
    rows = []
    for arm, each in found["arms"].items():
        _, accepted, of = off_and_accepted(each)
        largest = [f"{each['largest_difference']:.2g}", f"{each['largest_logit_difference']:.2g}"]
        rows.append([arm, f"{each['examples']}", *largest, f"{accepted:.2g} in {of}", f"{each['agreement']:.1%}"])
    columns = ["arm", "test photos", "largest difference in probability", "in a logit", "accepted", "same class"]
    return _table("Served on the CPU, from encoded photos", columns, rows, report)


def _memory_table(found: Found, report: Found) -> list[str]:
    code = str(found.get("fitting", {}).get("code", ""))
    rows = [[str(found["refused"]["code"]), found["message"], _number(found.get("batch")), code]]
    return _table("A batch that cannot fit", ["exit code", "said", "batch tried next", "its exit code"], rows, report)


def _rates_table(found: Found, report: Found) -> list[str]:
    rows = []
    for batch, workers in found["batches"].items():
        for name, worker in workers.items():
            for arm, rate in worker["arms"].items():
                rows.append(
                    [
                        *(arm, batch, name, str(worker["ready"].get("precision"))),
                        *(_number(rate["training"]), _number(rate["bare"]), f"{rate['share']:.1%}"),
                        _number(rate.get("utilisation"), "{:.0%}"),
                        *(_gigabytes(rate.get(each)) for each in ("memory", "memory_of_all")),
                        _number(worker["ready"]["compile_seconds"].get(arm), "{:.0f}"),
                    ]
                )
    columns = ["arm", "batch", "process", "precision", "images/s", "bare step", "share", "GPU busy"]
    columns += ["its peak memory, GB", "of all processes, GB", "first epoch, s"]
    return _table(f"Rates, {found['examples']:,} photos; goal: a share of 95%, busy 90%", columns, rows, report)


def _keras_table(found: Found, report: Found) -> list[str]:
    rows = []
    for batch, workers in found["batches"].items():
        for arm in ARMS:
            (ours, our), (theirs, their) = (fastest(workers, who, arm) for who in ("job", "Keras"))
            sums = [seconds_of_arm(workers, who, arm, found["examples"]) for who in ("job", "Keras")]
            rows.append(
                [
                    *(arm, batch, ours.partition(", ")[2], _number(our.get("training"))),
                    *(theirs.partition(", ")[2], _number(their.get("training"))),
                    *(_number(each, "{:.2f}") for each in sums),
                    _number(times_keras(workers, arm, found["examples"]), "{:.1f}"),
                    _number(TIMES_KERAS.get(arm), "{:g}"),
                ]
            )
    columns = ["arm", "batch", "job", "images/s", "tuned Keras", "images/s", "job's ten epochs, s", "Keras's, s"]
    caption = f"Beside tuned Keras, {found['examples']:,} photos, each as it is faster; no compilation, no validation"
    return _table(caption, [*columns, "times as fast", "goal"], rows, report)


def _decode_table(found: Found, report: Found) -> list[str]:
    rows = [[*(_number(found[name]) for name in ("job", "alone")), f"{found['share']:.0%}", str(found["cores"])]]
    return _table("Photos a second", ["job's reading", "decoding alone", "share (goal: 90%)", "cores"], rows, report)


def _devices_table(found: Found, report: Found) -> list[str]:
    if found["count"] < 2:
        return ["", "One GPU: what several do is not applicable here, and was not tried."]
    lines = _runs_table("One device, and all of them", found["runs"], report)
    lines += _runs_table("The same batch on each device", found["rates"], report)
    share = _number(linear_share(found), "{:.0%}")
    return [*lines, "", f"{found['count']} devices reach {share} of linear; the goal is 90%."]


_TABLES: dict[str, Callable[[Found, Found], list[str]]] = {
    "machine": _machine_table,
    "run": lambda found, report: _runs_table("The quickstart", {"run": found}, report),
    "serve": _serve_table,
    "deterministic": lambda found, report: _repeats_table("Twice the same, deterministic", found, report),
    "kill": lambda found, report: _repeats_table(f"Killed at {found['at']}, and started again", found, report),
    "memory": _memory_table,
    "rates": _rates_table,
    "keras": _keras_table,
    "precision": lambda found, report: _runs_table("Precision, four runs at once", found["runs"], report),
    "xla": lambda found, report: _runs_table("With XLA and without", found["runs"], report),
    "decode": _decode_table,
    "devices": _devices_table,
}


def write(folder: Path, report: Found) -> None:
    """Write JSON and page; each is replaced in one step."""
    write_json(folder / JSON, report)
    beside = folder / f".{PAGE}"
    beside.write_text(page(report), encoding="utf-8")
    beside.replace(folder / PAGE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.measure.gpu_page", description="the page, from the JSON")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    write(folder, judged_anew(json.loads((folder / JSON).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
