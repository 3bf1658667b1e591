"""What a run takes is counted over all of its lives, and a cap ends it whatever it is doing."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest

from job.errors import ConfigError
from job.experiment import cap
from job.experiment.cap import Spent
from job.machine.replicas import Replicas
from job.settings.groups import OutputSettings
from job.storage.locations import open_store
from job.storage.store import Store
from tests.support.running import python

FINGERPRINT = "ab" * 32


def account(store: Store, ago: float = 0.0, fingerprint: str = FINGERPRINT, **output: Any) -> cap.Account:
    """Return the account of a life that began so many seconds ago."""
    return cap.account(OutputSettings(**output), store, fingerprint, time.monotonic() - ago, Replicas())


def refused(store: Store, **output: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        account(store, **output)
    return [str(problem) for problem in caught.value.problems]


def test_lives_add_up_even_at_the_same_time_but_not_those_of_another_experiment(store: Store) -> None:
    with account(store, 1000).open(), account(store, 200).open(), account(store, 30, "cd" * 32).open():
        pass
    assert cap.spent_before(store, FINGERPRINT).seconds == pytest.approx(1200, abs=60)
    assert cap.spent_before(store, "cd" * 32).seconds == pytest.approx(30, abs=30)
    assert cap.spent_before(store, "ef" * 32) == Spent()


def test_a_life_tells_how_far_the_run_is(store: Store) -> None:
    first = account(store, 100)
    with first.open():
        first.follow(lambda: 0.5)
    with account(store, 20).open():
        pass
    told = cap.spent_before(store, FINGERPRINT)
    assert told.share == 0.5
    assert told.opening == pytest.approx(100, abs=60)


def test_a_life_is_told_of_before_more_than_a_checkpoint_of_it_can_be_lost(store: Store) -> None:
    with account(store, 1000, checkpoint_seconds=60).open():
        while not store.child("spent").list():
            time.sleep(0.01)
    with account(store, 0, checkpoint_seconds=3600).open():
        time.sleep(0.5)
        assert len(store.child("spent").list()) == 1


def test_a_start_that_is_refused_is_not_told_of(store: Store) -> None:
    def refuse(life: cap.Account) -> None:
        with life.open():
            raise ConfigError.of("TRANSFER_MAX_BAD_IMAGES", "too many")

    with pytest.raises(ConfigError, match="too many"):
        refuse(account(store, checkpoint_seconds=3600))
    assert store.list() == {}
    begun = account(store, checkpoint_seconds=3600)
    begun.follow(lambda: 0.1)
    with pytest.raises(ConfigError, match="too many"):
        refuse(begun)
    assert len(store.list()) == 1


def test_a_life_of_a_run_that_another_has_published_tells_nothing_more(store: Store) -> None:
    life = account(store, checkpoint_seconds=3600)
    with life.open():
        life.close()
    assert store.list() == {}


def test_the_rest_takes_the_start_of_another_life_and_goes_at_the_pace_so_far() -> None:
    assert Spent(seconds=110, opening=10, share=0.25).rest == 10 + 100 * 3
    assert Spent(seconds=110, opening=10, share=1.0).rest == 10
    assert Spent(seconds=110, opening=10, share=0.0).rest is None


def test_what_told_of_a_life_and_is_damaged_is_left_out_aloud(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    with account(store, 1000).open():
        pass
    place = store.child("spent")
    for number, damage in enumerate((b"{", b'{"seconds": -1}', b'{"seconds": 1e300}', b"\xff", b"[" * 100_000, b"[]")):
        place.put_bytes(f"{FINGERPRINT[:12]}-{number}.json", damage)
    with caplog.at_level(logging.WARNING):
        assert cap.spent_before(store, FINGERPRINT).seconds == pytest.approx(1000, abs=60)
    assert caplog.text.count("is damaged") == 6


def test_every_cap_that_the_rest_would_reach_is_told_with_what_would_do(tmp_path: Path) -> None:
    store = open_store(str(tmp_path), "TRANSFER_OUTPUT_URI")
    place = store.child("spent")
    place.put_bytes(f"{FINGERPRINT[:12]}-1.json", Spent(seconds=7200, opening=0, share=0.5).model_dump_json().encode())
    money = {"max_cost": 5.0, "cost_per_hour": 1.5}
    then = "or more: the run goes on from what is saved"
    assert refused(store, max_seconds=7200.0, **money) == [
        f"{variable} spent over all restarts, and the rest is estimated at {rest} {then}"
        for variable, rest in (
            ("TRANSFER_MAX_SECONDS: received 7200: 7200 s", "7200 s; give 14400"),
            ("TRANSFER_MAX_COST: received 5: 3.00 (7200 s)", "3.00 (7200 s); give 6"),
        )
    ]
    assert len(refused(store, max_seconds=7200.0, **money | {"max_cost": 6.0})) == 1
    assert list(place.list()) == [f"{FINGERPRINT[:12]}-1.json"]
    with account(store, max_seconds=7200.0 * 4, **money).open():
        pass


@pytest.mark.parametrize("output", [{"max_seconds": 1e9}, {"max_cost": 1e9, "cost_per_hour": 5e-324}, {}])
def test_caps_beyond_any_clock_end_nothing(tmp_path: Path, output: dict[str, float]) -> None:
    with account(open_store(str(tmp_path), "TRANSFER_OUTPUT_URI"), **output).open():
        pass


def test_a_run_goes_on_where_what_it_takes_cannot_be_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = open_store(str(tmp_path / "file" / "below"), "TRANSFER_CHECKPOINT_URI")
    with caplog.at_level(logging.WARNING), account(store).open():
        pass
    assert "does not tell what this run takes" in caplog.text


_CAPPED = """
import ctypes, os, signal, sys, time
from job import stopping
from job.errors import ConfigError, Stopped
stopping.GRACE_SECONDS = 8.0
stopping.heed()
from job.experiment import cap
from job.machine.replicas import Replicas
from job.settings.groups import OutputSettings
from job.storage.locations import open_store
output = OutputSettings(max_seconds=float(sys.argv[2]), checkpoint_seconds=3600)
account = cap.account(output, open_store(sys.argv[1], "X"), "ab" * 32, time.monotonic(), Replicas())
try:
    with account.open():
        exec(sys.argv[3])
except ConfigError as error:
    assert "TRANSFER_MAX_SECONDS" in str(error)
    stopping.leave(error.exit_code)
except Stopped as error:
    stopping.leave(error.exit_code)
"""


@pytest.mark.parametrize(
    ("seconds", "work", "ends"),
    [
        pytest.param(0.5, "time.sleep(60)", 78, id="in Python"),
        pytest.param(0.5, "ctypes.CDLL(None).sleep(60)", 78, id="in native code"),
        pytest.param(
            0.5,
            "try: time.sleep(60)\nexcept Stopped: raise AttributeError from None",
            78,
            id="in Python below native code",
        ),
        pytest.param(1e6, "os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", 143, id="stopped before"),
        pytest.param(
            3.0,
            "with stopping.deferred(): os.kill(os.getpid(), signal.SIGTERM); time.sleep(4)\nstopping.stop_if_asked()",
            143,
            id="stopped before, and still saving",
        ),
    ],
)
def test_a_cap_ends_the_process_with_its_code_and_a_stop_before_it_with_its_own(
    tmp_path: Path, seconds: float, work: str, ends: int
) -> None:
    python(_CAPPED, tmp_path, seconds, work, ends=ends, seconds=120)
    told = cap.spent_before(open_store(str(tmp_path), "X"), FINGERPRINT)
    assert told.seconds >= (seconds if ends == 78 else 0)
    assert told.seconds > 0
