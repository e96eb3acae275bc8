"""Serves one folder over HTTP, with range requests and with the latency and the bandwidth of a network.

    python -m benchmarks.range_server FOLDER --latency-ms 50 --mb-per-s 200

Prints its port. All connections share the bandwidth. `--password` lets only its user in, `--whole` ignores ranges, as simple
servers do, and after `--requests N` it answers 503 for ever. The tests of remote shards start it, too.
"""

import argparse
import asyncio
import base64
import os
import re
import time
from email.utils import formatdate
from pathlib import Path
from urllib.parse import unquote

_REASONS = {200: "OK", 206: "Partial Content", 401: "Unauthorized", 404: "Not Found", 416: "Range Not Satisfiable"}


class Server:
    """Answers GET and HEAD requests for the files of a folder."""

    def __init__(self, given: argparse.Namespace):
        self.given = given
        self.parent = os.getppid()
        self.answered = 0
        self.free_at = 0.0  # when the line has sent what was asked for so far

    async def serve(self) -> None:
        server = await asyncio.start_server(self.connection, "127.0.0.1", self.given.port, limit=2**16)
        print(server.sockets[0].getsockname()[1], flush=True)
        while os.getppid() == self.parent:  # it ends with whoever started it, also when that is killed
            await asyncio.sleep(1)

    async def connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                status, more, body = self.answer(head)
                await asyncio.sleep(self.given.latency_ms / 1000)
                lines = [
                    f"HTTP/1.1 {status} {_REASONS.get(status, 'Unavailable')}",
                    f"Content-Length: {len(body)}",
                    *more,
                ]
                if head.startswith("HEAD"):
                    body = b""
                await self.line(len(body))
                writer.write("\r\n".join([*lines, "", ""]).encode() + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def answer(self, head: str) -> tuple[int, list[str], bytes]:
        """Return status, headers and body."""
        fields = {name.lower(): value for name, value in re.findall(r"([\w-]+): *([^\r\n]*)", head)}
        if self.given.password:
            expected = "Basic " + base64.b64encode(self.given.password.encode()).decode()
            if fields.get("authorization") != expected:
                return 401, ['WWW-Authenticate: Basic realm="shards"'], b"who are you?"
        self.answered += 1
        if self.given.requests and self.answered > self.given.requests:
            return 503, [], b"later"
        file = self.given.folder / unquote(head.split()[1].partition("?")[0]).lstrip("/")
        if not file.is_file():
            return 404, [], b"not here"
        facts = file.stat()
        more = [f'ETag: "{facts.st_mtime_ns:x}"', f"Last-Modified: {formatdate(facts.st_mtime, usegmt=True)}"]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", fields.get("range", ""))
        if head.startswith("HEAD") or not asked or self.given.whole:
            return 200, more, file.read_bytes()
        first, last = int(asked[1]), min(int(asked[2] or facts.st_size), facts.st_size - 1)
        if first > last:
            return 416, more, b""
        with file.open("rb") as opened:
            opened.seek(first)
            return 206, [*more, f"Content-Range: bytes {first}-{last}/{facts.st_size}"], opened.read(last + 1 - first)

    async def line(self, num_bytes: int) -> None:
        """Wait until the line, which all connections share, has sent `num_bytes`."""
        if self.given.mb_per_s:
            now = time.monotonic()
            self.free_at = max(self.free_at, now) + num_bytes / (1e6 * self.given.mb_per_s)
            await asyncio.sleep(self.free_at - now)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--mb-per-s", type=float, default=0.0)
    parser.add_argument("--password", metavar="USER:PASSWORD")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--requests", type=int, default=0)
    asyncio.run(Server(parser.parse_args()).serve())


if __name__ == "__main__":
    main()
