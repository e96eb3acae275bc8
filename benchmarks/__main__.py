"""python -m benchmarks optimizer [--quick] [--out benchmarks/results]

Measures stages and writes one JSON row per case to OUT/<stage>.jsonl; see harness.py for what a row holds.
"""

import argparse
import importlib
from pathlib import Path

from rich.console import Console

from benchmarks import harness

STAGES = (
    "index",
    "decode",
    "augment",
    "data",
    "transfer",
    "batchformer",
    "heads",
    "optimizer",
    "step",
    "checkpoint",
)
OF_IMAGES = ("decode", "augment", "data")  # these take --images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="+", choices=STAGES, metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--quick", action="store_true", help="small sizes, few repeats: does it run?")
    parser.add_argument("--out", metavar="DIR", type=Path, help="append the rows to DIR/<stage>.jsonl")
    parser.add_argument(
        "--images", metavar="DIR", type=Path, help="decode, augment and load DIR/train/... (default: generated)"
    )
    arguments = parser.parse_args()
    console = Console(highlight=False)
    for stage in arguments.stages:
        options = {"images": arguments.images} if stage in OF_IMAGES else {}
        rows = importlib.import_module(f"benchmarks.{stage}").run(arguments.quick, **options)
        console.print(harness.table(stage, rows))
        if arguments.out is not None:
            harness.append(arguments.out / f"{stage}.jsonl", stage, rows)
            console.print(f"{len(rows)} rows in {arguments.out / f'{stage}.jsonl'}")


if __name__ == "__main__":
    main()
