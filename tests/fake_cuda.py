"""Stands in for torch.cuda where there is no GPU: streams that know what happens before what, and threads with a device.

Memory stays that of the CPU. `FakeCuda.launched` tells what each launch is ordered behind; what was launched on another stream
is in there only if somebody made one wait for the other.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import torch


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU; `recorded` holds (address, name of the stream) of every record_stream."""

    recorded: ClassVar[set[tuple[int, str]]] = set()

    is_cuda = True  # pyright: ignore[reportAssignmentType]
    is_cpu = False  # pyright: ignore[reportAssignmentType]

    def record_stream(self, s: Any) -> None:
        OnGpu.recorded.add((self.data_ptr(), s.name))


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnGpu)


class FakeStream:
    def __init__(self, device=None, name: str = "side"):
        self.device = torch.device("cuda", torch.device(device or "cuda").index or 0)
        self.name, self.seen = name, set()

    def wait_event(self, event: "FakeEvent") -> None:
        self.seen |= event.seen

    def wait_stream(self, other: "FakeStream") -> None:
        self.seen |= other.seen


class FakeEvent:
    """`elapsed_time` is the number of launches that the stream learned of between two events."""

    def __init__(self, enable_timing: bool = False):
        self.timed, self.waited_for = enable_timing, False

    def record(self, stream: Any = None) -> None:
        stream = stream or torch.cuda.current_stream()
        self.seen, self.device = set(stream.seen), stream.device

    def synchronize(self) -> None:
        self.waited_for = True

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert self.timed and end.timed and end.waited_for
        return float(len(end.seen - self.seen))


class FakeCuda:
    def __init__(self, monkeypatch):
        OnGpu.recorded.clear()
        self.compute = FakeStream(name="compute")
        self.launched: dict[str, set[str]] = {}  # -> what it is ordered behind
        self.devices: dict[str, torch.device] = {}  # set_device, by thread
        self._current = threading.local()
        replaced = {
            "Stream": FakeStream,
            "Event": FakeEvent,
            "stream": self.stream,
            "current_stream": lambda device=None: self.current,
            "set_device": self.set_device,
            "is_available": lambda: True,
            "is_initialized": lambda: False,
        }
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        to, empty, copy = torch.Tensor.to, torch.empty, torch._foreach_copy_

        def fake_to(tensor, *args, **kwargs):
            if args and isinstance(args[0], torch.device) and args[0].type == "cuda":
                if tensor.is_cuda:
                    return tensor
                self.launch_next("to GPU")
                return on_gpu(tensor.clone())
            return to(tensor, *args, **kwargs)

        def foreach_copy(targets, sources, non_blocking=False):
            copy(targets, sources)
            self.launch_next("to host" if isinstance(sources[0], OnGpu) else "copy")

        monkeypatch.setattr(torch.Tensor, "to", fake_to)
        monkeypatch.setattr(torch, "empty", lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs))
        monkeypatch.setattr(torch, "_foreach_copy_", foreach_copy)

    @property
    def current(self) -> FakeStream:
        return getattr(self._current, "stream", self.compute)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream | None) -> Iterator[None]:
        before = self.current
        self._current.stream = stream or before
        yield
        self._current.stream = before

    def set_device(self, device: torch.device) -> None:
        assert device.index is not None  # torch refuses it
        self.devices[threading.current_thread().name] = device

    def launch_next(self, kind: str) -> None:
        self.launch(f"{kind} {sum(name.startswith(kind) for name in self.launched)}")

    def launch(self, what: str) -> None:
        """Launch something on the current stream of this thread."""
        self.launched[what] = set(self.current.seen)
        self.current.seen.add(what)
