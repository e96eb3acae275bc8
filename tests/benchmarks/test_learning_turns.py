"""The sides of `python -m benchmarks learning` take turns, and only their own time counts."""

import sys
import time

import pytest

from benchmarks.learning import command, turns
from benchmarks.learning.command import Side, _calibrate, _minutes_to, main
from benchmarks.learning.turns import Runner, take_turns
from crossbatch import InputError

BUSY = """
import pathlib, sys, time
out, seconds = pathlib.Path(sys.argv[1]), float(sys.argv[2])
(out / "metrics.jsonl").write_text('{"images_seen": 8}\\n')
while time.process_time() < seconds:
    pass
(out / "mark").touch()
(out / "metrics.jsonl").write_text('{"images_seen": 8}\\n{"images_seen": 64}\\n')
sys.exit(int(sys.argv[3]))
"""


def side(folder, seconds: float, code: int = 0) -> Runner:
    folder.mkdir()
    command = [sys.executable, "-c", BUSY, str(folder), str(seconds), str(code)]
    return Runner(command, folder / "log", folder / "metrics.jsonl", lambda: folder.glob("mark"), {})


def test_only_the_own_turns_count(tmp_path):
    started, sides = time.monotonic(), [side(tmp_path / "a", 1.0), side(tmp_path / "b", 2.0)]
    take_turns(sides, 0.3)
    a, b = sides
    assert a.active_s >= 1.0 and b.active_s >= 2.0 and a.active_s + b.active_s <= time.monotonic() - started
    assert [images for _, images in b.progress] == [8, 64] and b.progress[0][0] < b.progress[1][0] <= b.active_s
    assert list(b.marks) == [tmp_path / "b" / "mark"] and a.cpu_s < b.cpu_s <= b.active_s + 0.1


def test_a_failure_is_told_and_ends_all(tmp_path):
    sides = [side(tmp_path / "fails", 0.1, code=3), side(tmp_path / "goes on", 60)]
    with pytest.raises(RuntimeError, match="exit code 3"):
        take_turns(sides, 0.3)
    assert all(runner.process.returncode is not None for runner in sides)


class Metronome:
    """Trains, in an endless run, from its fourth second on: 50 images a second until the tenth, then 100."""

    def __init__(self):
        self.active_s, self.ended, self.progress = 0.0, False, list[tuple[float, int]]()

    def turn(self, seconds: float) -> bool:
        for _ in range(round(seconds)):
            self.active_s += 1
            images = 50 * min(self.active_s - 4, 6) + 100 * max(self.active_s - 10, 0)
            self.progress += [(self.active_s, round(images))] if images > 0 else []
        return True

    def end(self) -> None:
        self.ended = True


def test_a_rate_is_measured_once_it_is_steady_for_as_long_as_it_takes(tmp_path, monkeypatch):
    sides = [Side(name, [], tmp_path, 1280, marks=4) for name in ("crossbatch", "plain")]
    started: list[Metronome] = []

    def start(self, steps: int, out, seed: int) -> Metronome:
        assert steps > command.CALIBRATION_S * 100 / self.config.train_batch_size  # else it would end before
        started.append(Metronome())
        return started[-1]

    monkeypatch.setattr(Side, "start", start)
    _calibrate(sides, tmp_path, slice_s=10)
    lost_s = 4 + 3  # of start-up, and until it is fast
    assert [(side.rate, side.start_s) for side in sides] == [(100, lost_s)] * 2
    longest = command.SETTLING_S + command.CALIBRATION_S + 2 * 10
    assert all(runner.ended and command.CALIBRATION_S <= runner.active_s <= longest for runner in started)


def test_minutes_to_an_accuracy_lie_between_the_points_of_a_curve():
    curve = [(1.0, 20.0), (2.0, 30.0), (3.0, 28.0)]
    assert [_minutes_to(accuracy, curve) for accuracy in (10.0, 25.0, 30.0, 31.0)] == [1.0, 1.5, 2.0, None]


def test_energy_is_what_the_counters_of_all_packages_rose_by(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "POWERCAP", tmp_path)
    assert not turns._energy_uj()
    for package in (0, 1):
        zone = tmp_path / f"intel-rapl:{package}"
        zone.mkdir()
        (zone / "max_energy_range_uj").write_text("10000000\n")
        (zone / "energy_uj").write_text("9000000\n")
    before = turns._energy_uj()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("9500000\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("2000000\n")  # beyond its range, from 0 again
    assert turns._joules_since(before) == 0.5 + 3.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "vit", "--sides", "stable-pretraining"], "cannot train the network vit; allowed: crossbatch"),
        (["--sides", "plain", "lightly"], "lightly is not installed; pip install lightly"),
    ],
)
def test_a_side_that_cannot_train_is_refused_at_once(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=message):
        main(["--images", str(tmp_path), *arguments])
