"""Output, exit codes and pictures: any text to any stream, and what the machine refuses is no traceback."""

import errno
import io
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crossbatch import RunStopped
from crossbatch.engine.evaluation.results import confusion_matrix, neighbour_grid, save_figures
from crossbatch.engine.run_log import RunLog, print_summary
from crossbatch.engine.runtime.exit_codes import run_main

ROOT = Path(__file__).parents[2]
PROTECTED = """
import os, sys
from crossbatch.engine.runtime.output import check_printed, protect_streams
protect_streams()
assert os.open("/dev/null", os.O_RDONLY) > 2
"""


def protected(code: str, redirection: str = "", **variables: str) -> subprocess.CompletedProcess:
    """Runs `code` after `protect_streams` in a shell's redirection."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, PROTECTED + code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, env=environment, capture_output=True, timeout=60)


@pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", ">/dev/full 2>/dev/full", ">&-"])
def test_field_streams_that_take_nothing_do_no_harm(redirection):
    code = "print('x' * 100000); sys.stdout.flush(); print('y', file=sys.stderr); sys.exit(5)"
    done = protected(code, redirection)
    assert done.returncode == 5 and b"Traceback" not in done.stderr and b"Exception" not in done.stderr


def test_field_a_reader_that_has_left_does_no_harm():
    code = "import time\nfor _ in range(99): print('x' * 9999)\nsys.stdout.flush(); check_printed(); os._exit(5)"
    command = [
        "bash",
        "-c",
        '"$0" -c "$1" | head -1 >/dev/null; exit ${PIPESTATUS[0]}',
        sys.executable,
        PROTECTED + code,
    ]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60).returncode == 5


def test_field_what_is_printed_in_vain_on_a_full_disk_is_told():
    code = "print('result')\ntry: check_printed()\nexcept RuntimeError as error: print(error, file=sys.stderr)"
    assert b"standard output cannot be written: No space left on device" in protected(code, ">/dev/full").stderr


@pytest.mark.parametrize("variables", [{"LANG": "en_US.UTF-8"}, {"PYTHONIOENCODING": "ascii"}], ids=str)
def test_field_names_that_are_no_text_are_escaped(variables):
    done = protected(r"print(os.fsdecode(b'caf\xe9'), '\u0142')", **variables)
    assert done.returncode == 0 and done.stdout.startswith(rb"caf\udce9")


def test_field_a_folder_named_like_markup_is_printed_as_it_is(capsys):
    print_summary([("run directory", "/x/[/exp1]"), ("other", "[exp1] :smile:")], ["knn [bold]"], Path("/x/[/exp1]"))
    said = capsys.readouterr().out
    assert "/x/[/exp1]" in said and "[exp1] :smile:" in said and "knn [bold]" in said


def exit_of(capsys, error: BaseException) -> tuple[int | str | None, str]:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/x/y"),
            3,
            "stopped (rank 0): /x/y: No space left on device;",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 3, "stopped (rank 0): Disk quota exceeded; make room"),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 3, "stopped (rank 0): /x: Read-only file system;"),
        (OSError(errno.EMFILE, "Too many open files", "/x"), 3, "raise the limit of open files"),
        (PermissionError(errno.EACCES, "Permission denied", "/data/val"), 2, "error: /data/val: Permission denied;"),
        (MemoryError(), 3, "stopped (rank 0): out of memory;"),
        (KeyboardInterrupt(), 3, "stopped (rank 0): interrupted;"),
        (RunStopped("why"), 3, "stopped (rank 0): why"),
    ],
)
def test_field_what_the_machine_refuses_is_a_message(capsys, error, code, said):
    found, text = exit_of(capsys, error)
    assert found == code and said in text and text.count("\n") == 1


def test_field_any_other_error_is_a_bug_with_its_traceback():
    def main() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file", "/x")

    with pytest.raises(FileNotFoundError):
        run_main(main)


def test_field_class_names_are_no_formulas(tmp_path, capsys):
    names = ["$100_$50", r"$\frac{", os.fsdecode(b"caf\xe9"), "_^{}"]
    truth = np.arange(4)
    save_figures(tmp_path, {"confusion": lambda: confusion_matrix(truth, truth, names, "title")})
    assert (tmp_path / "confusion.png").stat().st_size > 0 and capsys.readouterr().err == ""


def test_field_many_classes_need_no_dense_matrix():
    """10,000 classes: 100 million counts and percentages would take 1.6 GB."""
    truth = np.arange(10_000)
    tracemalloc.start()
    figure = confusion_matrix(truth, truth[::-1].copy(), [str(number) for number in truth], "title")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    drawn = figure.axes[0].images[0].get_array()
    assert peak < 2**28 and drawn is not None and drawn.shape == (1000, 1000)
    assert drawn[0, 999] == 100 and drawn.sum() == 100 * 1000
    assert figure.axes[0].get_xlabel() == "predicted (groups of 10 classes)"


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_field_images_of_any_number_of_channels_are_shown(tmp_path, channels):
    """The first batch in TensorBoard, and neighbours: three channels are colours, of fewer the first one is gray."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, channels), dtype=np.uint8)
    want = pixels[..., :3] if channels >= 3 else pixels[..., [0, 0, 0]]

    log = RunLog(tmp_path, 0, 2)
    log.first_views(torch.from_numpy(pixels).permute(2, 0, 1).expand(2, 1, channels, 6, 8))
    log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    shown = np.asarray(Image.open(io.BytesIO(events.Images("views")[0].encoded_image_string)))
    assert np.array_equal(shown[2:8, 2:10], want)  # in a frame of two pixels

    canvas = FigureCanvasAgg(neighbour_grid([[(pixels, "a", True)]], "title"))
    canvas.draw()
    image = canvas.figure.axes[0].images[0]
    array = image.get_array()
    assert array is not None
    drawn = image.to_rgba(array, bytes=True)[..., :3]
    assert np.allclose(drawn.astype(int), want, atol=1)
