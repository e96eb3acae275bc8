"""Tests shards in a bucket, with moto's S3 server on this machine: the same images as from the disk, and what is refused."""

import importlib
import os
import pickle
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from crossbatch.data import RemoteOptions, TrainLoader
from crossbatch.data.sources import describe_source, has_evaluation_split, open_source
from crossbatch.data.sources.shard_writer import write_shards
from crossbatch.engine.datasets import checksum

s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed (the extra remote)")
pytest.importorskip("moto.server", reason="moto is not installed (pip install 'moto[server,s3]')")
remote = importlib.import_module("crossbatch.data.sources.remote")  # fsspec's http needs aiohttp, which s3fs brings

SECRET = "verysecret"


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    write_shards(open_source("synthetic://60?size=48"), root / "train", 30)
    write_shards(open_source("synthetic://60?size=48", "eval"), root / "val", 100)
    return root


@pytest.fixture(scope="module")
def server(shards):
    """Serve a bucket with `shards` as imagenet/, and their tar files to train on without an index as plain/."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with pytest.MonkeyPatch.context() as patch:
            as_user(patch, url)
            end = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"{url}/moto-api/data.json").close()
                    break
                except urllib.error.URLError:
                    assert time.monotonic() < end and process.poll() is None
                    time.sleep(0.1)
            bucket = s3fs.S3FileSystem(use_listings_cache=False)
            bucket.mkdir("bucket")
            bucket.put(str(shards), "bucket/imagenet", recursive=True)
            for file in (shards / "train").glob("*.tar"):
                bucket.put(str(file), f"bucket/plain/{file.name}")
        yield url
    finally:
        process.kill()
        process.wait()


def as_user(patch: pytest.MonkeyPatch, url: str, key: str = "somebody") -> None:
    """Let requests go to `url` with a key."""
    for name, value in {
        "ENDPOINT_URL": url,
        "ACCESS_KEY_ID": key,
        "SECRET_ACCESS_KEY": SECRET,
        "DEFAULT_REGION": "us-east-1",
    }.items():
        patch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    remote._connection.cache_clear()


@pytest.fixture
def user(server, monkeypatch):
    as_user(monkeypatch, server)


def test_shards_in_a_bucket_are_those_of_the_disk(shards, user, tmp_path):
    local, options = open_source(shards), RemoteOptions(tmp_path / "cache", 1.0)
    for path in (
        "s3://bucket/imagenet",
        "s3://bucket/imagenet/train/train-{000000..000001}.tar?eval=s3://bucket/imagenet/val",
    ):
        source = open_source(path, remote=options)
        assert checksum(source) == checksum(local) and has_evaluation_split(path)
        assert [source.read(index) for index in range(60)] == [local.read(index) for index in range(60)]
        assert SECRET.encode() not in pickle.dumps(source)
    assert describe_source(source) == "60 images, 10 classes in s3://bucket/imagenet/train"
    evaluation, here = open_source("s3://bucket/imagenet", "eval"), open_source(shards, "eval")
    assert np.array_equal(evaluation.labels, here.labels) and evaluation.read(5) == here.read(5)


def test_a_prefix_without_an_index_is_listed_and_scanned(shards, user):
    local, source = open_source(shards), open_source("s3://bucket/plain")
    assert len(source) == 60 and not has_evaluation_split("s3://bucket/plain")
    assert [source.read(index) for index in range(60)] == [local.read(index) for index in range(60)]


@pytest.mark.long
def test_views_and_resuming_are_as_with_local_shards(shards, user, tmp_path):
    settings = {"batch_size": 12, "image_size": 24, "backend": "opencv", "workers": 2}
    local = TrainLoader(open_source(shards), **settings)
    there = TrainLoader(open_source("s3://bucket/imagenet", remote=RemoteOptions(tmp_path, 1.0)), **settings)
    with local, there:
        for expected, batch in zip(local.epoch(0, 2), there.epoch(0, 2), strict=True):
            assert batch.skipped == [] and (batch.views == expected.views).all()


@pytest.mark.parametrize("path", ["s3://nobucket/x", "s3://bucket/nothing", "s3://bucket/imagenet?eval=nothing"])
def test_no_such_bucket_or_folder(user, path):
    with pytest.raises(ValueError, match=r"no shards there, or no such bucket; expected s3://.*\.tar"):
        open_source(path, "eval" if "eval" in path else "train")


def test_access_denied(server, user, monkeypatch):
    """From now on the server wants to know who asks: the last test of this file."""
    request = urllib.request.Request(f"{server}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
    urllib.request.urlopen(request).close()
    source = open_source_as(monkeypatch, server, "nobody")
    assert "access denied (PermissionError: The AWS Access Key Id you provided does not exist" in source
    assert SECRET not in source and "nobody" not in source
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    remote._connection.cache_clear()
    with pytest.raises(ValueError, match=r"access denied \(NoCredentialsError.*FSSPEC_S3_ANON=true"):
        open_source("s3://bucket/imagenet")


def open_source_as(patch: pytest.MonkeyPatch, url: str, key: str) -> str:
    """Return why a user with `key` cannot open the shards."""
    as_user(patch, url, key)
    with pytest.raises(ValueError) as refused:
        open_source("s3://bucket/imagenet")
    return str(refused.value)
