"""Runs the tests that need a GPU and every stage in brief, in two calls of at most 9 minutes each.

It is made for a bare machine with one NVIDIA GPU and without a network, which may end a command after 10 minutes:

    export CROSSBATCH_COMMIT=$(git rev-parse --short HEAD)      # only where the copy has no .git; goes into every row
    python3 -m benchmarks.gpu --part 1 --out DIR                # GPU tests of models and data, then the rest; step, backbone
    python3 -m benchmarks.gpu --part 2 --out DIR                # all other stages
    python3 -m benchmarks.gpu --only tests-rest step --out DIR  # some of them again, with all of the time
    make bench-gpu PART=1 OUT=DIR VENV= PYTHON=python3          # the same as the first; without VENV= it installs first

Each part of a call is a process of its own with a share of the time that is left; one that fails or takes longer says so, and
the rest goes on. What a part prints is shown at once, failures of tests too. The call leaves in DIR:

    bench-gpu-1.tgz     all that follows, brought up to date after every part; those of both calls unpack into one folder
    <stage>.jsonl       rows, as soon as they are measured
    outcomes-1.json     how each part ended
    <part>.txt          what it printed
    report/             see `python -m benchmarks report`

It needs the packages of setup.py. DALI, DeepSpeed and apex may be missing: one rank is then sharded by FSDP2, and rows that
would need the others are left out. This file itself needs only Python, so that it can say what is missing. Triton's kernels are
compiled, never interpreted.
"""

import json
import os
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path

from benchmarks import parser_of, processes
from benchmarks.stages import STAGES

ROOT = Path(__file__).parents[1]
QUICK = ("collectives", "index", "remote", "memory")  # these tell nothing about a GPU and are only tried
REPORT_S = 25.0  # kept back for it
LEAST_S = 5.0  # a part with less time than that is left out
PYTEST = ["pytest", "-mgpu", "-q", "--tb=short", "-pbenchmarks.instant_failures", "-ofaulthandler_timeout=60"]
PYTEST += ["--continue-on-collection-errors"]  # of a file that this torch does not run, only its own tests are lost
TESTS = {
    "tests-models-data": ["tests/models", "tests/data"],
    "tests-rest": ["tests", "--ignore=tests/models", "--ignore=tests/data"],
}
# Shares of the time that is left when a part begins.
PARTS = {
    "1": {"machine": 2, "tests-models-data": 6, "tests-rest": 5, "step": 10, "backbone": 2},
    "2": {stage: 2 for stage in STAGES if stage not in ("step", "backbone")},
}
PARTS["2"] |= {"trainer": 5, "batchformer": 6, "norm": 5, "heads": 4, "checkpoint": 3, "ema": 1, "decode": 1}


def main(arguments: list[str]) -> int:
    """Run all parts and return the exit code: 0 if each of them succeeded, else 1."""
    parser = parser_of("python -m benchmarks.gpu", __doc__)
    out = ROOT / "benchmarks" / "results" / f"gpu-{time.strftime('%Y%m%d-%H%M%S')}"
    names = [name for shares in PARTS.values() for name in shares]
    add = parser.add_argument
    add("--part", choices=PARTS, help="one of two calls (default: both, one after the other)")
    add("--only", metavar="NAME", nargs="+", choices=names, help=f"instead of a part, some of {', '.join(names)}")
    add("--out", metavar="DIR", type=Path, default=out, help="default: benchmarks/results/gpu-<time>")
    add("--minutes", metavar="N", type=float, default=9.0, help="for a call; default 9")
    add("--effort", choices=("quick", "brief"), default="brief", help="default: brief")
    given = parser.parse_args(arguments)
    # Also for what the tests start: crossbatch need not be installed.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["TRITON_INTERPRET"] = "0"
    calls = {"only": dict.fromkeys(given.only, 1)} if given.only else PARTS
    good = True
    for call in [given.part] if given.part and not given.only else calls:
        parts = Parts(given.out.resolve(), call, 60 * given.minutes - LEAST_S)  # what starting and stopping takes
        parts.run_all(calls[call], given.effort)
        good = good and all(outcome.startswith("done") for outcome in parts.outcomes.values())
    return 0 if good else 1


class Parts:
    """Runs one part after the other for at most `seconds`, and keeps what each prints and how it ends."""

    def __init__(self, out: Path, call: str, seconds: float):
        self.out, self.call, self.end = out, call, time.monotonic() + seconds
        self.archive = out / f"bench-gpu-{call}.tgz"  # of all results
        self.outcomes: dict[str, str] = {}
        out.mkdir(parents=True, exist_ok=True)

    @property
    def left_s(self) -> float:
        """Return the seconds that are left."""
        return self.end - time.monotonic()

    def run_all(self, shares: dict[str, int], effort: str) -> None:
        """Run the parts named by `shares`, then the report."""
        rest = sum(shares.values())
        for name, share in shares.items():
            self.run(name, self.command(name, effort), (self.left_s - REPORT_S) * share / rest)
            rest -= share
        if any(self.out.glob("*.jsonl")):  # not after tests alone
            self.run("report", [sys.executable, "-m", "benchmarks", "report", str(self.out)], 60)
        print(f"all of it: {self.archive}")

    def command(self, name: str, effort: str) -> list[str]:
        """Return the command that runs a part."""
        if name == "machine":
            return [sys.executable, "launch/doctor.py"]
        if name in TESTS:
            return [sys.executable, "-m", *PYTEST, *TESTS[name]]
        flag = "--quick" if name in QUICK else f"--{effort}"
        return [sys.executable, "-m", "benchmarks", name, "--in-process", flag, "--out", str(self.out)]

    def run(self, name: str, command: list[str], limit_s: float) -> None:
        """Run a part for at most `limit_s`, show what it prints, and note how it ended."""
        limit_s = min(limit_s, max(LEAST_S, self.left_s))
        print(f"--- {name} (at most {max(0, limit_s):.0f} s)", flush=True)
        outcome = "left out: no time"
        if limit_s >= LEAST_S:
            printed = self.out / f"{name}.txt"
            tee = subprocess.Popen(["tee", printed], stdin=subprocess.PIPE)
            assert tee.stdin is not None
            code, outcome = processes.run(command, limit_s, tee.stdin, ROOT)
            tee.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                tee.wait(5)  # something may have left the group of the part, and hold the pipe
            tee.kill()
            lines = printed.read_text(encoding="utf-8", errors="replace").splitlines()
            if lines and (code != 0 or name in TESTS):
                outcome += f": {lines[-1].strip()}"
        print(f"{name}: {outcome}", flush=True)
        self.outcomes[name] = outcome
        outcomes = self.out / f"outcomes-{self.call}.json"
        outcomes.write_text(json.dumps(self.outcomes, indent=2) + "\n", encoding="utf-8")
        self.pack()

    def pack(self) -> None:
        """Write the archive anew; a call that is ended from outside leaves the last whole one."""
        new = self.archive.with_suffix(".new")
        with tarfile.open(new, "w:gz") as archive:
            for file in sorted(self.out.iterdir()):
                if file.suffix not in (".tgz", ".new"):
                    archive.add(file, file.name)
        new.replace(self.archive)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
