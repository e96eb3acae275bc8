"""Runs two networks in lockstep, so that what their norms gather at the same place travels in one message.

The online and the momentum backbone have the same norms, and neither depends on the other's activations. So norm k of the one
can wait until the other has reached its own norm k, and one collective serves both:

    online      conv, conv, norm 1 asks ──┐         ┌── norm 1 goes on, conv, norm 2 asks ──┐
                                          └─> other │                                       └─> ...
    momentum                 conv, conv, norm 1 asks, gather both

A network is a call stack, and two stacks take two threads. But only one of them runs at any time: the second moves only while
the first waits in a norm. So the order of all operations is fixed, on a GPU all run on one stream, and results have the bits
that one network after the other gives. The networks need not know, and need not be alike: a gather that finds no partner is
sent alone, and each side gets back what it gave, whatever its shape.

The two must not share modules that gather, because one would be inside a forward pass of the other (FSDP2 frees parameters at
the end of one), nor draw random numbers, because they would take turns at one generator.
"""

import contextvars
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

import torch
from torch import Tensor, overrides
from torch.utils import _python_dispatch

from crossbatch.models.collective import Collective

First = TypeVar("First")
Second = TypeVar("Second")
Request = tuple[Collective, Tensor]

_here = threading.local()  # .all_gather: what `LockstepCollective.all_gather` does in this thread


class LockstepCollective(Collective):
    """Call `inner`; inside `in_lockstep`, let a gather share its message with that of the other function."""

    def __init__(self, inner: Collective):
        self.inner = inner

    @property
    def rank(self) -> int:
        return self.inner.rank

    @property
    def world_size(self) -> int:
        return self.inner.world_size

    def all_gather(self, tensor: Tensor) -> Tensor:
        together = getattr(_here, "all_gather", None)
        return self.inner.all_gather(tensor) if together is None else together(self.inner, tensor)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self.inner.all_reduce(tensor)

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        return self.inner.reduce_scatter(tensor)


def in_lockstep(first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
    """Return `first()` and `second()`, while gathers of a `LockstepCollective` in the two share messages.

    An exception of either reaches the caller, and ends the other at its next gather.

    Args:
        first: runs as it is called here, with a graph if gradients are enabled.
        second: runs without gradients, under the autocast, the stream and the modes of the caller.
    """
    other = _Second(second)
    _here.all_gather = other.gather_with
    try:
        ours = first()
    except BaseException:
        other.end()
        raise
    finally:
        _here.all_gather = None
    return ours, other.finish()


class _Abandoned(BaseException):
    """Ends a second function after the first has failed."""


class _Second:
    """Runs `function` in a thread of its own, which moves only while the caller waits in `_resume`."""

    def __init__(self, function: Callable[[], Any]):
        self._function = function
        self._results: list[Any] = []
        self._thread: threading.Thread | None = None
        self._has_ended = False
        self._answer: Tensor | None = None  # to its last request; None ends it
        self._requests: SimpleQueue[Request | BaseException | None] = SimpleQueue()  # None: there will be no more
        self._answers: SimpleQueue[Tensor | None] = SimpleQueue()

    def gather_with(self, collective: Collective, tensor: Tensor) -> Tensor:
        """Gather `tensor`, and in the same message what the thread wants to gather next."""
        request = self._resume()
        if request is None:
            return collective.all_gather(tensor)
        other, theirs = request
        if other is not collective or theirs.dtype != tensor.dtype or theirs.device != tensor.device:
            gathered = collective.all_gather(tensor)
            self._answer = other.all_gather(theirs)
            return gathered
        sizes = tensor.numel(), theirs.numel()
        both = collective.all_gather(torch.cat((tensor.detach().flatten(), theirs.flatten())))
        # Contiguous, so that sums over the ranks take the same order as alone.
        ours, self._answer = (
            part.contiguous().view(-1, *like.shape)
            for part, like in zip(both.split(sizes, dim=1), (tensor, theirs), strict=True)
        )
        return ours

    def finish(self) -> Any:
        """Run the function to its end and return its result."""
        try:
            if self._thread is None:  # nothing was gathered
                with torch.no_grad():
                    return self._function()
            while (request := self._resume()) is not None:
                collective, tensor = request
                self._answer = collective.all_gather(tensor)
            return self._results.pop()
        finally:
            self.end()

    def end(self) -> None:
        """Let the thread end at its next gather, if it has not ended yet, and wait for that."""
        if self._thread is not None:
            self._answers.put(None)
            self._thread.join()

    def _resume(self) -> Request | None:
        """Let the thread go on to its next gather, which is returned; None if it has ended. Raises what it raised."""
        if self._has_ended:
            return None
        if self._thread is None:
            run = contextvars.copy_context().run
            self._thread = threading.Thread(target=run, args=(self._run, _state_of_thread()), daemon=True)
            self._thread.start()
        else:
            self._answers.put(self._answer)
        request = self._requests.get()
        self._has_ended = not isinstance(request, tuple)
        if isinstance(request, BaseException):
            try:
                raise request
            finally:
                del request  # or the traceback would hold itself, and all activations
        return request

    def _run(self, adopt_state: Callable[[], None]) -> None:
        try:
            adopt_state()
            _here.all_gather = self._ask
            self._results.append(self._function())
            self._requests.put(None)
        except _Abandoned:
            pass
        except BaseException as error:
            self._requests.put(error)

    def _ask(self, collective: Collective, tensor: Tensor) -> Tensor:
        self._requests.put((collective, tensor.detach()))
        answer = self._answers.get()
        if answer is None:
            raise _Abandoned
        return answer


def _state_of_thread() -> Callable[[], None]:
    """Return a function that gives a new thread what torch keeps for each thread; gradients stay off there."""
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
    autocasts = [(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
    caches = torch.is_autocast_cache_enabled()
    dispatch_modes = _python_dispatch._get_current_dispatch_mode_stack()
    function_modes = overrides._get_current_function_mode_stack()

    def adopt() -> None:
        torch.set_grad_enabled(False)
        if stream is not None:
            torch.cuda.set_stream(stream)  # and its device
        for kind, is_enabled, dtype in autocasts:
            torch.set_autocast_enabled(kind, is_enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(caches)
        for mode in dispatch_modes:
            _python_dispatch._push_mode(mode)
        for mode in function_modes:
            overrides._push_mode(mode)

    return adopt
