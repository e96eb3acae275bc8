"""Tests shards in a Google bucket: gcsfs's requests, answered on this machine, bring the same images as the disk."""

import importlib
import importlib.util
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from crossbatch.data import RemoteOptions, TrainLoader
from crossbatch.data.sources import has_evaluation_split, open_source
from crossbatch.data.sources.shard_writer import write_shards
from crossbatch.engine.datasets import checksum

if importlib.util.find_spec("gcsfs") is None:
    pytest.skip("gcsfs is not installed (the extra remote)", allow_module_level=True)
remote = importlib.import_module("crossbatch.data.sources.remote")


class Bucket(BaseHTTPRequestHandler):
    """Answers what a reader asks of Google's JSON API: a list, an object's description, and its bytes."""

    folder: Path
    allowed = True
    asked: list[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        found = re.fullmatch(r"/(?:download/)?storage/v1/b/bucket(/o)?(?:/(.+))?", url.path)
        self.asked.append(self.path)
        if not self.allowed:
            return self._say(403, {"error": {"code": 403, "message": "no storage.objects.get access"}})
        if found is None:
            return self._say(404, {"error": {"code": 404, "message": "the bucket does not exist"}})
        if not found[1]:
            return self._say(200, {"kind": "storage#bucket", "name": "bucket"})
        if not found[2]:
            return self._say(200, self._listed(query.get("prefix", ""), query.get("delimiter", "")))
        file = self.folder / unquote(found[2])
        if not file.is_file():
            return self._say(404, {"error": {"code": 404, "message": "no such object"}})
        if query.get("alt") != "media":
            return self._say(200, self._object(file))
        content, part = file.read_bytes(), re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self._send(206 if part else 200, content[int(part[1]) : int(part[2]) + 1] if part else content)

    def _object(self, file: Path) -> dict:
        facts = file.stat()
        name = str(file.relative_to(self.folder))
        return {"name": name, "bucket": "bucket", "size": str(facts.st_size), "generation": str(facts.st_mtime_ns)}

    def _listed(self, prefix: str, delimiter: str) -> dict:
        files = sorted(file for file in self.folder.rglob("*") if file.is_file())
        inside = [file for file in files if str(file.relative_to(self.folder)).startswith(prefix)]
        here = [
            file for file in inside if not delimiter or "/" not in str(file.relative_to(self.folder))[len(prefix) :]
        ]
        rest = {
            str(file.relative_to(self.folder))[len(prefix) :].partition("/")[0] for file in inside if file not in here
        }
        return {
            "items": [self._object(file) for file in here],
            "prefixes": [f"{prefix}{name}/" for name in sorted(rest)],
        }

    def _say(self, status: int, answer: dict) -> None:
        self._send(status, json.dumps(answer).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("bucket")
    write_shards(open_source("synthetic://60?size=48"), root / "imagenet" / "train", 30)
    write_shards(open_source("synthetic://60?size=48", "eval"), root / "imagenet" / "val", 100)
    return root / "imagenet"


@pytest.fixture
def bucket(shards, monkeypatch):
    """Serve a bucket with `shards` as imagenet/."""
    handler = type("Served", (Bucket,), {"folder": shards.parent, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setitem(remote.conf, "gs", {"token": "anon"})
    remote._connection.cache_clear()
    files, _ = remote._connection("gs", os.getpid())
    type(files).clear_instance_cache()
    remote._connection.cache_clear()
    yield handler
    remote._connection.cache_clear()
    server.shutdown()
    thread.join()
    server.server_close()


def test_shards_in_a_bucket_are_those_of_the_disk(shards, bucket, tmp_path):
    local, options = open_source(shards), RemoteOptions(tmp_path / "cache", 1.0)
    for path in (
        "gs://bucket/imagenet",
        "gs://bucket/imagenet/train/train-{000000..000001}.tar?eval=gs://bucket/imagenet/val",
    ):
        source = open_source(path, remote=options)
        assert checksum(source) == checksum(local) and has_evaluation_split(path)
        assert [source.read(index) for index in range(60)] == [local.read(index) for index in range(60)]
    evaluation, here = open_source("gs://bucket/imagenet", "eval"), open_source(shards, "eval")
    assert (evaluation.labels == here.labels).all() and evaluation.read(5) == here.read(5)


def test_views_and_resuming_are_as_with_local_shards(shards, bucket):
    settings = {"batch_size": 12, "image_size": 24, "backend": "opencv", "workers": 0}
    local, there = (TrainLoader(open_source(path), **settings) for path in (shards, "gs://bucket/imagenet"))
    with local, there:
        for expected, batch in zip(local.epoch(0, 3), there.epoch(0, 3), strict=True):
            assert batch.skipped == [] and (batch.views == expected.views).all()


def test_no_such_bucket_and_no_access(bucket):
    for path in ("gs://nobucket/x", "gs://bucket/nothing"):
        with pytest.raises(ValueError, match=r"no shards there, or no such bucket; expected gs://.*\.tar"):
            open_source(path)
    bucket.allowed = False
    with pytest.raises(ValueError, match=r"access denied .*GOOGLE_APPLICATION_CREDENTIALS"):
        open_source("gs://bucket/imagenet")
