"""The benchmark: its figures and verdicts on known numbers, and plain Keras run for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.measure.bench import (
    Bound,
    Finished,
    ProcessError,
    Repeat,
    Run,
    bounds,
    execute,
    from_manifest,
    last_json,
    machine,
    report,
    run_plain,
    table,
)
from tests.support.running import CLASSES

ARMS = ("scratch", "frozen", "fine_tune")


def run(scratch: float, frozen: float, fine_tune: float, accuracy: float = 0.9, wall: float = 0.0) -> Run:
    seconds = dict(zip(ARMS, (scratch, frozen, fine_tune), strict=True))
    interval = dict.fromkeys(ARMS, (accuracy - 0.03, accuracy + 0.03))
    return Run(wall, 1_500_000_000, seconds, dict.fromkeys(ARMS, accuracy), interval)


# Three rounds on a machine that slows down: the seconds double and treble, the ratios of a round stay near each other.
ROUNDS = [
    Repeat(
        run(100 * slow, 10 * slow, 40 * slow, wall=150 * slow + 20),
        run(120 * slow, 90 * slow + extra, 80 * slow, accuracy=0.92),
        run(200 * slow, 300 * slow, 300 * slow, accuracy=0.88),
        {"frozen": 0.9 * slow, "fine_tune": 60.0 * slow},
    )
    for slow, extra in ((1, 0), (2, 2), (3, 6))
]
STEP_RATE = {"frozen": {"bare": 1000.0, "training": 970.0, "share": 0.97}}


def verdict(start: str, rounds: list[Repeat] = ROUNDS) -> Bound:
    (found,) = (bound for bound in bounds(rounds, STEP_RATE) if bound.sentence.startswith(start))
    return found


def test_a_ratio_is_formed_within_each_repeat_before_the_median_is_taken() -> None:
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in table(ROUNDS).splitlines()[2:]}
    assert list(rows) == [*ARMS, "all"]
    assert rows["frozen"][1:6] == ["20.0", "182.0", "9.1 (9.0 - 9.2)", "600.0", "30.0 (30.0 - 30.0)"]
    assert rows["frozen"][6:9] == ["0.900 (0.870 - 0.930)", "0.920", "0.880"]
    assert rows["all"][1:6] == ["300.0", "582.0", "1.9 (1.9 - 1.9)", "1600.0", "5.3 (5.3 - 5.3)"]
    assert rows["all"][-1] == "1.50, 1.50, 1.50 GB |"


def test_rounds_without_untuned_keras_leave_its_columns_to_the_others() -> None:
    rounds = [ROUNDS[0], *(Repeat(one.job, one.tuned) for one in ROUNDS[1:])]
    rows = {line.split(" | ")[0].removeprefix("| "): line.split(" | ") for line in table(rounds).splitlines()[2:]}
    assert rows["frozen"][1:6] == ["20.0", "182.0", "9.1 (9.0 - 9.2)", "300.0", "30.0"]


def test_every_row_has_a_cell_for_every_column() -> None:
    assert len({line.count(" | ") for line in table(ROUNDS).splitlines()}) == 1


def test_a_bound_is_judged_by_its_median() -> None:
    frozen = verdict("frozen at least")
    assert frozen.line() == "- frozen at least 8 times faster than tuned Keras: 9.1 (9.0 - 9.2): yes"
    slower = [Repeat(run(100, 12, 40), repeat.tuned, repeat.article) for repeat in ROUNDS[:1]]
    assert verdict("frozen at least", slower).line().endswith(": 7.5: MISSED")


def test_what_is_outside_the_compared_seconds_is_bounded_by_run_and_result() -> None:
    rest = verdict("start-up")
    assert (rest.values, rest.limit, rest.holds) == ((20, 20, 20), 30, True)


def test_a_second_seed_is_measured_against_tuned_keras() -> None:
    assert verdict("a second seed of frozen").line().endswith(": 1.0% (1.0% - 1.0%): yes")
    assert verdict("a second seed of fine_tune").line().endswith(": 75.0% (75.0% - 75.0%): MISSED")


def test_an_accuracy_may_be_lower_by_the_width_of_its_interval_and_no_more() -> None:
    assert verdict("frozen's test accuracy").holds
    much_better = [Repeat(one.job, run(120, 90, 80, accuracy=0.97), one.article) for one in ROUNDS]
    assert not verdict("frozen's test accuracy", much_better).holds


def test_what_was_not_measured_is_said_and_does_not_count_as_reached() -> None:
    rounds = [Repeat(one.job, one.tuned, one.article) for one in ROUNDS]
    unmeasured = [bound for bound in bounds(rounds, None) if not bound.values]
    assert len(unmeasured) == 3
    assert not any(bound.holds for bound in unmeasured)
    assert report("A machine.", rounds, None).count(": not measured\n") == 3


def test_the_report_has_the_machine_both_tables_and_every_bound() -> None:
    text = report(machine(), ROUNDS, STEP_RATE)
    assert "TensorFlow" in text.splitlines()[0]
    assert "| frozen | 1000 | 970 | 97.0% |" in text
    assert text.count("\n- ") == len(bounds(ROUNDS, STEP_RATE)) == 10


def test_a_process_that_fails_is_an_error_with_its_output(tmp_path: Path) -> None:
    with pytest.raises(ProcessError, match=r"(?s)exit code 78.*TRANSFER_EPOCHS"):
        execute(["job", "plan"], {"TRANSFER_EPOCHS": "none"}, tmp_path / "log")


def test_a_process_is_measured_and_what_it_wrote_is_kept(tmp_path: Path) -> None:
    done = execute(["json.tool", "--help"], {}, tmp_path / "log")
    assert done.wall > 0
    assert done.peak > 1_000_000
    assert "usage" in done.output


def test_the_last_json_line_is_found_among_the_log() -> None:
    assert last_json('{"a": 1}\nEpoch 1\n{"b": 2}\nbye\n') == {"b": 2}


def test_export_is_no_part_of_what_a_result_is_compared_by() -> None:
    seconds = {"data": 1.0, "features": 2.0, "training": 4.0, "evaluation": 8.0, "export": 16.0, "total": 31.0}
    tested = {"accuracy": 0.9, "accuracy_interval": [0.87, 0.93]}
    results = [{"arm": arm, "seconds": seconds, "metrics": {"test": tested}} for arm in ARMS]
    measured = from_manifest(Finished(100.0, 1, ""), {"results": results})
    assert measured.seconds == dict.fromkeys(ARMS, 15.0)
    assert measured.rest == 55.0
    assert measured.interval["frozen"] == (0.87, 0.93)


@pytest.fixture(scope="module")
def plain(small: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The small comparison without the photo that cannot be decoded, where plain Keras stops; weights of its own."""
    import keras

    from tests.support.photos import write_dataset

    folder = tmp_path_factory.mktemp("plain")
    weights = folder / "plain.weights.h5"
    keras.applications.MobileNet(include_top=False, weights=None, input_shape=(32, 32, 3)).save_weights(weights)
    dataset = write_dataset(folder, "pets", {"train": 80}, CLASSES, size=40)
    changed = {"TRANSFER_DATASET": str(dataset), "TRANSFER_WEIGHTS": str(weights), "TRANSFER_DETERMINISTIC": "false"}
    return small | changed


# An arm each: Keras traces every phase anew, ten seconds a time on a slow core.
@pytest.mark.slow
@pytest.mark.parametrize(("variant", "arm"), [("tuned", "fine_tune"), ("article", "frozen")])
def test_plain_keras_trains(variant: str, arm: str, plain: dict[str, str], tmp_path: Path) -> None:
    measured = run_plain(variant, plain | {"TRANSFER_ARMS": arm}, tmp_path)
    assert list(measured.seconds) == list(measured.accuracy) == [arm]
    assert 0 < measured.seconds[arm] < measured.wall
    assert 0 <= measured.accuracy[arm] <= 1
