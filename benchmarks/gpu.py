"""Runs the tests that need a GPU, and every stage in brief, in one go: `python -m benchmarks.gpu [--minutes 8]`

It is made for a machine with one NVIDIA GPU and without a network. Each part has a share of the time; one that fails or takes
longer says so, and the rest goes on. It leaves a folder:

    <stage>.jsonl    rows, as soon as they are measured
    outcomes.json    how each part ended
    <part>.txt       what it printed
    report/          see `python -m benchmarks report`

It needs the packages of setup.py. DALI, DeepSpeed and pytest may be missing: what needs them fails, or does without. This file
itself needs none, so that it can say what is missing.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from benchmarks import processes
from benchmarks.stages import STAGES

ROOT = Path(__file__).parents[1]
NOT_OF_A_GPU = ("collectives", "index")  # these are only tried
TESTS_SHARE = 0.35  # of the time, at most
REPORT_S = 30.0  # kept back for it
LEAST_S = 5.0  # a stage with less time than that is left out


def main(arguments: list[str]) -> int:
    """Run all parts and return the exit code: 0 if each of them succeeded, else 1."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out = ROOT / "benchmarks" / "results" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}"
    add = parser.add_argument
    add("--out", metavar="DIR", type=Path, default=out, help="default: benchmarks/results/gpu-<time>")
    add("--minutes", metavar="N", type=float, default=8.0, help="for all of it; default 8")
    add("--stages", metavar="STAGE", nargs="*", default=STAGES, choices=STAGES, help="default: all")
    add("--effort", choices=("quick", "brief"), default="brief", help="default: brief")
    given = parser.parse_args(arguments)
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = Parts(out, time.monotonic() + 60 * given.minutes - 5)  # what starting and stopping takes
    # Also for what the tests start: crossbatch need not be installed.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.chdir(ROOT)
    python = [sys.executable, "-m"]
    parts.run("machine", [sys.executable, "launch/doctor.py"], 60)
    parts.run("tests", [*python, "pytest", "-m", "gpu", "-q"], TESTS_SHARE * 60 * given.minutes)
    for stage in given.stages:
        effort = "quick" if stage in NOT_OF_A_GPU else given.effort
        command = [*python, "benchmarks", stage, "--in-process", f"--{effort}", "--out", str(out)]
        left = parts.left_s - REPORT_S
        parts.run(stage, command, min(left, max(left / 2, 30)))
    parts.run("report", [*python, "benchmarks", "report", str(out)], 60)
    print(f"all of it: {out}")
    return 0 if all(outcome.startswith("done") for outcome in parts.outcomes.values()) else 1


class Parts:
    """Runs one part after the other until `end`, and keeps what each prints and how it ends."""

    def __init__(self, out: Path, end: float):
        self.out, self.end = out, end
        self.outcomes: dict[str, str] = {}

    @property
    def left_s(self) -> float:
        """Return the seconds until `end`."""
        return self.end - time.monotonic()

    def run(self, name: str, command: list[str], limit_s: float) -> None:
        """Run a part for at most `limit_s`, print the end of what it printed, and note how it ended."""
        limit_s = min(limit_s, max(LEAST_S, self.left_s))
        print(f"--- {name} (at most {max(0, limit_s):.0f} s)", flush=True)
        outcome = "left out: no time"
        if limit_s >= LEAST_S:
            printed = self.out / f"{name}.txt"
            with printed.open("wb") as output:
                code, outcome = processes.run(command, limit_s, output)
            lines = printed.read_text(encoding="utf-8", errors="replace").splitlines()
            print("\n".join(lines[-40:]), flush=True)
            if lines and (code != 0 or name == "tests"):
                outcome += f": {lines[-1].strip()}"
        print(f"{name}: {outcome}", flush=True)
        self.outcomes[name] = outcome
        (self.out / "outcomes.json").write_text(json.dumps(self.outcomes, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
