"""Runs the sides of the protocol in `benchmarks.learning` and scores what they saved."""

import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks import learning, parser_of
from benchmarks.learning import FIGURES, SOONER
from benchmarks.learning.peers import PACKAGES, PEERS, RESNETS_ONLY
from benchmarks.learning.turns import Runner, take_turns
from benchmarks.measure import append
from benchmarks.rows import Row, short, show
from crossbatch import InputError
from crossbatch.data import open_source
from crossbatch.engine.config import Device, load_config, usable_cores

ROOT = Path(__file__).parents[2]
SIDES = ("crossbatch", *PEERS)
MARKS, WARMUP = 4, 0.1
SETTLING_S, CALIBRATION_S = 20, 150  # of a side's turns, before its rate is measured, and measuring it
ENDLESS = 1000  # epochs that a side is given for that; it is ended before
RECIPE = "cifar10"
NETWORKS = {
    "resnet": ['crossbatch.model.backbone_args={"width": 16}'],
    "vit": [
        "crossbatch.model.arch=vit_small",
        'crossbatch.model.backbone_args={"embed_dim": 96, "depth": 6, "num_heads": 3, "patch_size": 4}',
        "crossbatch.model.stem=imagenet",
        "crossbatch.model.stop_grad_conv1=true",
    ],
}
SHARED = [
    "train_batch_size=128",
    "crossbatch.precision=fp32",  # two of the peers have no other
    "crossbatch.model.mlp_dim=512",
    "crossbatch.batchformer.loss=none",  # nor BatchFormer, which an ablation adds; its groups then:
    "crossbatch.batchformer.group_size=64",
    "optimizer.params.base_lr=2e-3",
    "crossbatch.momentum.base=0.97",
]
BANK = "?fraction=0.2,seed=0"  # of the training images, for the k-NN
SCORE_SETTINGS = {"knn": ["--set=crossbatch.knn.k=[20]"], "linear": ["--set=crossbatch.linear.cache=true"]}


@dataclass
class Side:
    """Holds how one side runs, and what was found of it."""

    name: str
    overrides: list[str]
    images: Path
    num_images: int
    marks: int  # how often it saves
    rate: float = math.nan  # images/s of its own turns, start-up left out
    start_s: float = math.nan

    def __post_init__(self) -> None:
        self.config = load_config(ROOT / "ds_configs" / f"{RECIPE}.json", self.overrides)
        self.per_epoch = self.num_images // self.config.train_batch_size

    def steps(self, minutes: float) -> int:
        """Return the number of steps that fit into so many minutes of its turns."""
        return max(1, int(self.rate * (60 * minutes - self.start_s) / self.config.train_batch_size))

    def command(self, steps: int, out: Path, seed: int) -> list[str]:
        """Return the command that trains `steps` steps and saves."""
        epochs = steps / self.per_epoch
        settings = [
            *self.overrides,
            f"crossbatch.seed={seed}",
            f"crossbatch.schedule.warmup_epochs={WARMUP * epochs}",
            f"crossbatch.schedule.epochs={epochs}",
        ]
        recipe = str(ROOT / "ds_configs" / f"{RECIPE}.json")
        if self.name in PEERS:
            command = [sys.executable, "-m", "benchmarks.learning.peers", self.name, "--recipe", recipe]
            command += ["--images", str(self.images), "--marks", str(self.marks), "--out", str(out)]
            return command + _set(settings)
        every = math.ceil(steps / self.marks)
        settings += [
            "crossbatch.evaluate.knn_every_epochs=0",
            "crossbatch.evaluate.every_epochs=0",
            f"crossbatch.checkpoint.every_steps={every}",
            f"crossbatch.checkpoint.keep_every_steps={every}",
            "crossbatch.checkpoint.keep=1",
            "crossbatch.log.every_steps=5",
        ]
        launch = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--deepspeed_config", recipe]
        return [*launch, "--data", str(self.images), "--out", str(out), *_set(settings)]

    def start(self, steps: int, out: Path, seed: int) -> Runner:
        """Start the process that trains this side; it waits for its first turn."""
        out.mkdir(parents=True)
        folder, pattern = ("marks", "step-*.pth") if self.name in PEERS else ("checkpoints", "step-*")
        command, log = self.command(steps, out, seed), out.with_suffix(".log")
        return Runner(command, log, out / "metrics.jsonl", lambda: (out / folder).glob(pattern), _environment())

    def score(self, checkpoint: Path, by: str = "knn") -> float:
        """Return the accuracy of saved weights in percent, by k-NN or by a linear probe on features of central views."""
        out = checkpoint.with_name(f"{checkpoint.name}-{by}")
        command = [sys.executable, str(ROOT / "launch" / f"{by}.py"), "--checkpoint", str(checkpoint)]
        command += ["--out", str(out), "--data", f"{self.images}{BANK if by == 'knn' else ''}", *SCORE_SETTINGS[by]]
        if self.name in PEERS:  # whose files do not say which network it is
            ours = self.config.crossbatch
            model = {"arch": ours.model.arch, "stem": ours.model.stem, "backbone_args": dict(ours.model.backbone_args)}
            command += [f"--set=crossbatch.model.{name}={json.dumps(value)}" for name, value in model.items()]
            command += [f"--set=crossbatch.data.image_size={ours.data.image_size}"]
        environment = _environment(OMP_NUM_THREADS="1")  # on a CPU, one is scored on each core
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(
                f"{' '.join(command)} ended with exit code {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return json.loads((out / "results.json").read_text())["top1"]


def _set(settings: list[str]) -> list[str]:
    return [f"--set={setting}" for setting in settings]


def _environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": paths, **more}


def main(arguments: list[str]) -> None:
    """Measure what a command line asks for, and print a table. Raises InputError."""
    parser = parser_of("python -m benchmarks learning", learning.__doc__)
    add = parser.add_argument
    add("--images", metavar="DIR", type=Path, required=True, help="class folders in DIR/train and DIR/val or DIR/test")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", metavar="M", type=float, default=10, help="that each side trains (default 10)")
    what = "train each side on so many epochs instead, one after the other"
    length.add_argument("--epochs", metavar="E", type=float, help=what)
    add("--seeds", metavar="N", type=int, nargs="+", default=[0], help="one run of each side for each (default 0)")
    add("--sides", nargs="*", choices=SIDES, help="default: all that can train the network")
    what = "one more side: crossbatch with other values of keys (path=value), for an ablation; may be repeated"
    add("--variant", metavar=("NAME", "path=value"), nargs="+", action="append", default=[], help=what)
    add("--network", choices=list(NETWORKS), default="resnet", help="a ResNet-18 of width 16 (default), or a small ViT")
    add("--set", metavar="path=value", action="append", default=[], help="change a key of the recipe, for all sides")
    add("--slice", metavar="S", type=float, default=10, help="seconds of a turn (default 10)")
    add("--out", metavar="DIR", type=Path, help="append the rows to DIR/learning.jsonl")
    given = parser.parse_args(arguments)
    if not given.images.is_dir():
        raise InputError(f"--images: no such folder: {given.images}; name one that holds train/...")
    possible = [side for side in SIDES if given.network == "resnet" or side not in RESNETS_ONLY]
    names = possible if given.sides is None else given.sides
    for name in names:
        if name not in possible:
            raise InputError(f"--sides: {name} cannot train the network {given.network}; allowed: {' '.join(possible)}")
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            raise InputError(f"--sides: {name} is not installed; pip install {name}, or name other sides")
    overrides = [*SHARED, *NETWORKS[given.network], *given.set]
    images = given.images, len(open_source(given.images, "train")), MARKS if given.epochs is None else 1
    sides = [Side(name, overrides, *images) for name in names]
    sides += [Side(name, [*overrides, *changes], *images) for name, *changes in given.variant]
    if not sides:
        raise InputError("--sides: given none and no --variant; name at least one")
    with tempfile.TemporaryDirectory() as folder:
        found = []
        if given.epochs is None:
            _calibrate(sides, Path(folder), given.slice)
            steps, length = {side.name: side.steps(given.minutes) for side in sides}, f"{given.minutes:g} minutes"
        else:
            steps = {side.name: round(given.epochs * side.per_epoch) for side in sides}
            length = f"{given.epochs:g} epochs"
        length += ", ViT" if given.network == "vit" else ""
        together = [sides] if given.epochs is None else [[side] for side in sides]
        for seed, group in itertools.product(given.seeds, together):
            rows = _train(group, steps, Path(folder) / str(seed), seed, length, given.slice)
            found += rows
            if given.out is not None:
                append(given.out / "learning.jsonl", "learning", rows)
    lines = [[row.case, short(row.p50), *(_cell(row.settings, name) for name in FIGURES)] for row in found]
    show(f"k-NN after {length}", ["case", "k-NN, %", *FIGURES], lines)


def _calibrate(sides: list[Side], folder: Path, slice_s: float) -> None:
    """Find each side's images per second, and the seconds until it trains."""
    runners = [side.start(ENDLESS * side.per_epoch, folder / f"{side.name}-rate", 0) for side in sides]

    def enough(runner: Runner) -> bool:
        return len(settled(runner)) > 2 and runner.progress[-1][0] - settled(runner)[0][0] > CALIBRATION_S

    def settled(runner: Runner) -> list[tuple[float, int]]:
        return [(at, images) for at, images in runner.progress if at > runner.progress[0][0] + SETTLING_S]

    take_turns(runners, slice_s, enough)
    for side, runner in zip(sides, runners, strict=True):
        (first_s, first), *_, (last_s, last) = settled(runner)
        side.rate = (last - first) / (last_s - first_s)
        side.start_s = first_s - first / side.rate


def _train(sides: list[Side], steps: dict[str, int], folder: Path, seed: int, length: str, slice_s: float) -> list[Row]:
    """Train sides in turns and return a row of each."""
    runners = [side.start(steps[side.name], folder / side.name, seed) for side in sides]
    rows = []
    take_turns(runners, slice_s)
    with ThreadPoolExecutor(1 if Device.detect().type == "cuda" else usable_cores()) as pool:
        pairs = list(zip(sides, runners, strict=True))
        linear = [pool.submit(side.score, max(runner.marks), "linear") for side, runner in pairs]
        knn = [[pool.submit(side.score, path) for path in sorted(runner.marks)] for side, runner in pairs]
    for number, (side, runner) in enumerate(pairs):
        minutes = [runner.marks[path] / 60 for path in sorted(runner.marks)]
        curve = [(at, found.result()) for at, found in zip(minutes, knn[number], strict=True)]
        images = runner.progress[-1][1]
        settings = {
            "linear, %": linear[number].result(),
            "minutes": runner.active_s / 60,
            "seed": seed,
            "images": images,
            "images/s": images / runner.active_s,
            "CPU ms an image": 1000 * runner.cpu_s / images,
            "busy cores": runner.cpu_s / runner.active_s,
            "J an image": None if runner.energy_j is None else runner.energy_j / images,
            "curve": curve,
            "recipe": RECIPE,
            "overrides": side.overrides,
            "slice_s": slice_s,
        }
        rows.append(Row.of_one(f"{side.name}, seed {seed}, {length}", curve[-1][1], "% k-NN", settings))
    peers = [row for side, row in zip(sides, rows, strict=True) if side.name in PEERS]
    for row in rows if peers else []:
        row.settings[SOONER] = _minutes_to(max(peer.p50 for peer in peers), row.settings["curve"])
    return rows


def _minutes_to(accuracy: float, curve: list[tuple[float, float]]) -> float | None:
    """Return when a curve reaches `accuracy`, None if it does not; straight lines between its points."""
    if curve[0][1] >= accuracy:
        return curve[0][0]
    for (start, low), (end, high) in itertools.pairwise(curve):
        if low < accuracy <= high:
            return start + (end - start) * (accuracy - low) / (high - low)
    return None


def _cell(settings: dict, name: str) -> str:
    value = settings.get(name)
    return "" if value is None else short(value)
