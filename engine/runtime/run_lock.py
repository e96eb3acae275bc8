"""Lets one command at a time write into a run directory.

The lock is a POSIX lock (`fcntl.lockf`) on OUT/.lock. The kernel gives it up with the process, after a SIGKILL too; the workers
of a killed run do not keep it, as they would with `flock`; and NFS takes it to the server, so that it holds between hosts.

Two cases are left: a file system without such locks, and NFS mounted with `nolock`, where each host locks for itself. So the
holder also touches the file every few seconds. Whoever gets no word from the kernel, or finds a file that a process of another
host has left behind, first looks for some seconds whether it is still touched. No clocks are compared.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from crossbatch import InputError
from crossbatch.engine.runtime.distributed import on_main

LOCK = ".lock"  # in the run directory
BEAT_S, WATCH_S = 5.0, 13.0  # a busy NFS server may delay one touch


@contextlib.contextmanager
def locked_on_main(out: Path) -> Iterator[None]:
    """Hold the lock of `out` on rank 0; all ranks call it. Raises InputError on all if another process holds it."""
    with contextlib.ExitStack() as stack:
        on_main(lambda: stack.enter_context(locked(out)))
        yield


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the lock of the run directory `out`, which is created, and removed if nothing was written into it.

    Raises InputError if another process holds it.
    """
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    descriptor, done = _acquire(out), threading.Event()

    def touch() -> None:
        while not done.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(descriptor)

    thread = threading.Thread(target=touch, name="lock", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with contextlib.suppress(OSError):
            (out / LOCK).unlink()  # before the lock is given up, so that nobody holds a lock on a removed file
        os.close(descriptor)
        with contextlib.suppress(OSError):
            if is_new:
                out.rmdir()


def _acquire(out: Path) -> int:
    """Return a descriptor that holds the lock of `out`."""
    path, me = out / LOCK, {"host": socket.gethostname(), "pid": os.getpid()}
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            holder, has_locks = _read(descriptor), True
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise _in_use(out, holder) from None
                has_locks = False
            if not _is_at(descriptor, path):
                os.close(descriptor)
                continue  # its holder has removed it meanwhile
            if holder and (not has_locks or holder.get("host") != me["host"]) and _is_touched(path, holder):
                raise _in_use(out, holder)
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(me).encode() + b"\n", 0)
            return descriptor
        except BaseException:
            os.close(descriptor)
            raise


def _read(descriptor: int) -> dict[str, object]:
    """Return who has written a lock file; {} if nobody has."""
    try:
        return json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}


def _is_at(descriptor: int, path: Path) -> bool:
    """Return whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _is_touched(path: Path, holder: dict[str, object]) -> bool:
    """Return whether another process touches the file at `path`, after looking for some seconds."""
    print(f"{path} was left by {_name(holder)}: looking for {WATCH_S:g} s whether it still runs", file=sys.stderr)
    end, before = time.monotonic() + WATCH_S, path.stat().st_mtime_ns
    while time.monotonic() < end:
        time.sleep(min(1.0, WATCH_S / 4))
        with path.open("rb") as file:  # opened anew, NFS asks the server
            if os.fstat(file.fileno()).st_mtime_ns != before:
                return True
    return False


def _in_use(out: Path, holder: dict[str, object]) -> InputError:
    return InputError(f"--out {out}: {_name(holder)} is writing into it; wait for its end, or choose another folder")


def _name(holder: dict[str, object]) -> str:
    return f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= holder.keys() else "another process"
