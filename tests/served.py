"""A web server of a folder that a test may kill, and start again at the same port."""

import subprocess
import sys
from pathlib import Path


class Served:
    """Serves `folder` until `stop`; `flags` are those of benchmarks/range_server.py."""

    def __init__(self, folder: Path, *flags: str):
        self.folder, self.flags, self.port = folder, flags, 0
        self.start()
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "benchmarks.range_server",
            str(self.folder),
            f"--port={self.port}",
            *self.flags,
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout
        self.process.stdout.close()
