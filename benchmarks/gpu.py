"""python -m benchmarks.gpu [--out DIR] [--minutes 8] [--stages STAGE...]

Everything that a machine with one NVIDIA GPU can say, in one go and without a network: the tests that need a GPU, and every
stage in brief. Each part has a share of the time; one that fails or takes longer says so, and the rest goes on. It leaves a
folder:

    <stage>.jsonl    rows, as soon as they are measured
    outcomes.json    how each part ended
    <part>.txt       what it printed
    report/          see `python -m benchmarks report`

Needs the packages of setup.py, of which DALI, DeepSpeed and pytest may be missing: what needs them fails, or does without. This
file itself needs none, so that it can say what is missing.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
# What the GPU decides comes first: if time runs out, the rest is left out.
STAGES = ("step", "backbone", "batchformer", "heads", "optimizer", "ema", "transfer", "augment", "data", "decode")
STAGES += ("checkpoint", "collectives", "index")
NOT_OF_A_GPU = ("collectives", "index")  # these are only tried
TESTS_SHARE = 0.35  # of the time, at most
REPORT_S = 30.0  # kept back for it


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: benchmarks/results/gpu-<time>")
    parser.add_argument("--minutes", metavar="N", type=float, default=8.0, help="for all of it; default 8")
    parser.add_argument(
        "--stages", metavar="STAGE", nargs="*", default=list(STAGES), choices=STAGES, help="default: all"
    )
    parser.add_argument("--effort", choices=("quick", "brief"), default="brief", help="default: brief")
    given = parser.parse_args(arguments)
    out = (given.out or ROOT / "benchmarks" / "results" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    out.mkdir(parents=True, exist_ok=True)
    parts = Parts(out, time.monotonic() + 60 * given.minutes - 5)  # what starting and stopping takes
    python = [sys.executable, "-m"]
    # Also for what the tests start: crossbatch need not be installed.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    parts.command("machine", [sys.executable, "launch/doctor.py"], 60)
    parts.command("tests", [*python, "pytest", "-m", "gpu", "-q"], TESTS_SHARE * 60 * given.minutes)
    for stage in given.stages:
        left = parts.left_s - REPORT_S
        effort = "quick" if stage in NOT_OF_A_GPU else given.effort
        parts.stage(stage, effort, min(left, max(left / 2, 30)))
    parts.command("report", [*python, "benchmarks", "report", str(out)], 60)
    print(f"all of it: {out}")
    return 0 if all(outcome.startswith("done") for outcome in parts.outcomes.values()) else 1


class Parts:
    """Runs one part after the other until `end`, and keeps what each prints and how it ends."""

    def __init__(self, out: Path, end: float):
        self.out, self.end = out, end
        self.outcomes: dict[str, str] = {}

    @property
    def left_s(self) -> float:
        return self.end - time.monotonic()

    def command(self, name: str, command: list[str], limit_s: float) -> None:
        limit_s, start = max(5.0, min(limit_s, self.left_s)), time.monotonic()
        print(f"--- {name} (at most {limit_s:.0f} s)", flush=True)
        with self._printed(name).open("wb") as file:
            process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            try:
                code = process.wait(limit_s)
                outcome = "done in" if code == 0 else f"failed with exit code {code} after"
            except subprocess.TimeoutExpired:
                outcome = "stopped after"
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._ended(name, f"{outcome} {time.monotonic() - start:.0f} s")

    def stage(self, name: str, effort: str, limit_s: float) -> None:
        print(f"--- {name} (at most {max(0, limit_s):.0f} s)", flush=True)
        if limit_s < 5:
            outcome = "left out: no time"
        else:
            try:
                run_alone = importlib.import_module("benchmarks.stages").run_alone
                outcome = run_alone(measure, (name, effort, self.out, self._printed(name)), limit_s)
            except Exception as error:  # what the stages need is missing, most likely
                outcome = f"failed: {type(error).__name__}: {error}"
        self._ended(name, outcome)

    def _ended(self, name: str, outcome: str) -> None:
        printed = self._printed(name)
        lines = printed.read_text(encoding="utf-8", errors="replace").splitlines() if printed.exists() else []
        if lines and (not outcome.startswith("done") or name == "tests"):
            outcome += f": {lines[-1].strip()}"
        print("\n".join([*lines[-40:], f"{name}: {outcome}"]), flush=True)
        self.outcomes[name] = outcome
        (self.out / "outcomes.json").write_text(json.dumps(self.outcomes, indent=2) + "\n", encoding="utf-8")

    def _printed(self, name: str) -> Path:
        return self.out / f"{name}.txt"


def measure(stage: str, effort: str, out: Path, printed: Path) -> None:
    """A stage, in its process; what it prints goes to a file."""
    with printed.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    from benchmarks import stages
    from benchmarks.harness import Effort

    stages.measure(stage, Effort(effort), out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
