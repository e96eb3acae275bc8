"""Tests remote shards against web servers that run here: images are those of the disk, whatever happens to server and cache."""

import itertools
import logging
import multiprocessing
import os
import pickle
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crossbatch import InputError
from crossbatch.data import BACKENDS, ImagesLost, RemoteOptions, TrainLoader
from crossbatch.data.augment.backends import has_dali
from crossbatch.data.sources import describe_source, has_evaluation_split, open_source
from crossbatch.data.sources import shards as shards_module
from crossbatch.data.sources.location import REMOTE, parse
from crossbatch.data.sources.shard_writer import write_shards
from crossbatch.data.sources.subset import read_ahead
from crossbatch.engine.config import load_config
from crossbatch.engine.datasets import checksum
from tests.served import Served
from tests.small_runs import slow_unless

pytest.importorskip("aiohttp", reason="aiohttp is not installed (the extra remote)")
from crossbatch.data.sources import remote, remote_cache

IMAGES = 60


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Write two shards to train on and one to evaluate on, about 6 kB an image."""
    root = tmp_path_factory.mktemp("shards")
    write_shards(open_source(f"synthetic://{IMAGES}?size=48"), root / "train", IMAGES // 2)
    write_shards(open_source("synthetic://60?size=48", "eval"), root / "val", 100)
    return root


@pytest.fixture(scope="module")
def url(shards):
    served = Served(shards)
    yield served.url
    served.stop()


@pytest.fixture
def serve():
    """Return what starts a server; all are stopped at the end."""
    started = []

    def start(*arguments) -> Served:
        started.append(Served(*arguments))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.stop()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(remote, "_PIECE", 2**14)


@contextmanager
def deaf_for(served: Served, seconds: float):
    """Kill a server, and start it again after some seconds."""
    served.stop()
    again = threading.Timer(seconds, served.start)
    again.start()
    yield
    again.join()


def cached(folder: Path, kib: float = 2**20) -> RemoteOptions:
    return RemoteOptions(folder, kib / 2**20)


def used(folder: Path) -> int:
    return sum(file.stat().st_blocks * 512 for file in (folder / "shards").iterdir())


def assert_same(source, other, order=None):
    assert len(source) == len(other) and np.array_equal(source.labels, other.labels)
    order = range(len(other)) if order is None else order
    read_ahead(source, order)
    for index in order:
        assert source.read(index) == other.read(index) and source.name(index) == other.name(index)


PATHS = ("{url}", "{url}/train/train-{{000000..000001}}.tar?eval={url}/val/val-000000.tar", "{url}?eval=val")


@pytest.mark.parametrize("path", PATHS)
def test_remote_shards_are_those_of_the_disk(shards, url, path, tmp_path):
    path, local = path.format(url=url), open_source(shards)
    source: Any = None
    for _ in range(2):
        source = open_source(path, remote=cached(tmp_path / "cache"))
        assert checksum(source) == checksum(local) and source.class_names == local.class_names
        assert_same(source, local)
        assert_same(pickle.loads(pickle.dumps(source)), local, [3, 59, 3])
    assert not source._images._coming  # nothing piles up
    assert describe_source(source) == f"60 images, 10 classes in {url}/train"
    assert has_evaluation_split(path)
    assert_same(open_source(path, "eval"), open_source(shards, "eval"))
    part = open_source(f"{path}{'&' if '?' in path else '?'}per_class=2")
    assert_same(part, open_source(f"{shards}?per_class=2"))


def test_shards_without_an_index_are_scanned_once(shards, tmp_path, serve, monkeypatch):
    for file in (shards / "train").glob("*.tar"):
        (tmp_path / "www/train").mkdir(parents=True, exist_ok=True)
        os.link(file, tmp_path / "www/train" / file.name)
    served = serve(tmp_path / "www")
    with pytest.raises(ValueError, match=r"expected .*/train/index\.npz, which a web server needs"):
        open_source(served.url)
    path, local = f"{served.url}/train/train-{{000000..000001}}.tar", open_source(tmp_path / "www")
    first = open_source(path, cache=tmp_path / "run", remote=cached(tmp_path / "cache"))
    monkeypatch.setattr(shards_module, "_scan", None)
    for source in (first, open_source(path, cache=tmp_path / "other", remote=cached(tmp_path / "cache"))):
        assert checksum(source) == checksum(local) and not has_evaluation_split(path)
        assert_same(source, local)


@pytest.mark.parametrize(
    ("backend", "kept"),
    [
        pytest.param(backend, kept, marks=slow_unless(kept == (backend == "opencv")))
        for backend, kept in itertools.product(BACKENDS, (False, True))
    ],
)
def test_views_and_resuming_are_as_with_local_shards(shards, url, tmp_path, backend, kept):
    if backend == "dali" and not has_dali():
        pytest.skip("DALI is not installed")
    options = cached(tmp_path / "cache", 200) if kept else None
    settings = {"batch_size": 12, "image_size": 24, "backend": backend, "workers": 2}
    with (
        TrainLoader(open_source(shards), **settings) as one,
        TrainLoader(open_source(url, remote=options), **settings) as other,
    ):
        for epoch, start in ((0, 3), (1, 0)):  # in the middle, and into the next epoch
            for expected, batch in zip(one.epoch(epoch, start), other.epoch(epoch, start), strict=True):
                assert batch.skipped == [] and np.array_equal(batch.indices, expected.indices)
                assert (batch.views == expected.views).all() and (batch.labels == expected.labels).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_server_that_comes_back_costs_time_and_no_images(shards, serve, workers, tmp_path):
    served, local = serve(shards), open_source(shards)
    settings = {"batch_size": 20, "image_size": 16, "backend": "opencv"}
    source = open_source(served.url, remote=cached(tmp_path / "cache"))
    one, other = TrainLoader(local, **settings), TrainLoader(source, workers=workers, **settings)
    with one, other, deaf_for(served, 1.5):
        for expected, batch in zip(one.epoch(0), other.epoch(0), strict=True):
            assert batch.skipped == [] and (batch.views == expected.views).all()


def test_what_was_read_ahead_needs_no_server(shards, serve):
    served, local = serve(shards), open_source(shards)
    source: Any = open_source(served.url)
    source.read_ahead(range(8))
    for piece in source._images._coming.values():
        piece.data.result()
    served.stop()
    assert_same(source, local, range(8))


@pytest.mark.parametrize("backend", ["opencv", "dali"])
def test_a_server_that_is_gone_is_named(shards, serve, backend):
    if backend == "dali" and not has_dali():
        pytest.skip("DALI is not installed")
    served = serve(shards)
    source = open_source(served.url, remote=RemoteOptions(retry_s=0.5))
    served.stop()
    said = rf"{served.url}/train/.*: no answer for . s \(.*; look whether the server runs"
    loader = TrainLoader(source, batch_size=20, image_size=16, backend=backend, workers=1)
    with loader, pytest.raises(ImagesLost, match=said):
        next(loader.epoch(0))
    with pytest.raises(ValueError, match="no answer for"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(remote, "_OPENING_S", 0.2)
        open_source(served.url)


def test_passwords_come_from_netrc_and_go_nowhere(shards, serve, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    served = serve(shards, "--password=me:verysecret")
    remote._connection.cache_clear()
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ValueError, match=r"access denied .*; give credentials that may read it: ~/\.netrc"):
        open_source(served.url)
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password verysecret\n")
    (tmp_path / "netrc").chmod(0o600)
    remote.fsspec.filesystem("http").clear_instance_cache()
    remote._connection.cache_clear()
    source = open_source(served.url, remote=RemoteOptions(retry_s=0.1))
    assert_same(source, open_source(shards))
    served.stop()
    with pytest.raises(ImagesLost) as lost:
        source.read(0)
    assert "verysecret" not in f"{lost.value} {caplog.text}" and b"verysecret" not in pickle.dumps(source)


@pytest.mark.parametrize("scheme", REMOTE)
@pytest.mark.parametrize(
    "rest", ["me:verysecret@host/x", "host/x?sig=verysecret", "host/x?fraction=0.1&token=verysecret"]
)
def test_credentials_in_a_path_are_refused_without_a_trace(scheme, rest):
    with pytest.raises(ValueError, match=r"config\.json") as refused:
        parse(f"{scheme}://{rest}")
    assert "verysecret" not in str(refused.value)
    with pytest.raises(InputError, match=r"crossbatch\.data\.path: ") as refused:
        load_config(None, [f"crossbatch.data.path={scheme}://{rest}"])
    assert "verysecret" not in str(refused.value)


def test_signed_addresses_do_not_show_in_messages():
    said = remote._without_secrets(
        "403, url='https://cdn/x.tar?Signature=verysecret' (https://me:verysecret@cdn/y)\nverysecret"
    )
    assert said == "403, url='https://cdn/x.tar' (https://cdn/y)"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("{url}/nothing", "nothing: no shards there, or no such bucket; expected .*/nothing/train/index.npz"),
        ("{url}/train/train-{{000000..000003}}.tar", "train-000002.tar: no such file"),
        ("{url}/train/train-{{0..", "a brace without its other half"),
        ("{url}/train/train-{{000003..000001}}.tar", "counts down"),
        ("{url}/train/train-{{000001}}.tar", "neither a range nor a list"),
        ("{url}?size=3", "unknown option in '.*'; allowed: eval, fraction, per_class, seed"),
        ("https://", "needs a host, as in https://host/imagenet"),
    ],
)
def test_bad_paths(url, path, said):
    with pytest.raises(ValueError, match=said):
        open_source(path.format(url=url))


def test_nothing_to_evaluate_on(url):
    assert not has_evaluation_split(f"{url}/train")
    for path, said in (
        (f"{url}/train", "has none of val, .*eval=FOLDER"),
        (f"{url}?eval=none", "none: no shards there"),
    ):
        with pytest.raises(ValueError, match=said):
            open_source(path, "eval")


def test_patterns_are_those_of_webdataset():
    assert remote.expand("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert remote.expand("{a,bc}/{0..1}.tar") == ["a/0.tar", "a/1.tar", "bc/0.tar", "bc/1.tar"]


def test_a_server_without_ranges(shards, serve):
    with pytest.raises(ValueError, match="sends whole files where a range is asked for"):
        open_source(serve(shards, "--whole").url)


def test_a_missing_package(monkeypatch):
    def missing(*arguments, **options):
        raise ImportError("Install s3fs to access S3")

    remote._connection.cache_clear()
    monkeypatch.setattr(remote.fsspec, "filesystem", missing)
    with pytest.raises(ValueError, match=r"s3:// needs a package .*; install it: pip install 'crossbatch\[remote\]'"):
        open_source("s3://bucket/x")


def test_the_cache_stays_within_its_limit_and_serves_without_a_server(shards, serve, tmp_path):
    served, local = serve(shards), open_source(shards)
    whole = open_source(served.url, remote=cached(tmp_path / "whole"))
    small = open_source(served.url, remote=cached(tmp_path / "small", 150))
    for _ in range(2):
        assert_same(whole, local)
        assert_same(small, local)
    assert 50_000 < used(tmp_path / "small") <= 150 * 1024 < used(tmp_path / "whole")
    served.stop()
    assert_same(whole, local)


def read_for_ever(url: str, folder: str, seed: int) -> None:
    remote._PIECE = 2**14
    source = open_source(url, remote=cached(Path(folder), 250))
    for index in itertools.chain.from_iterable(
        np.random.default_rng(seed).permutation(len(source)) for _ in itertools.count()
    ):
        source.read(int(index))


def test_processes_share_a_cache_and_may_be_killed(shards, url, tmp_path):
    context, local = multiprocessing.get_context("forkserver"), open_source(shards)
    readers = [context.Process(target=read_for_ever, args=(url, str(tmp_path), seed)) for seed in range(2)]
    for reader in readers:
        reader.start()
    while not (tmp_path / "shards/used").exists() or used(tmp_path) < 100_000:
        time.sleep(0.01)
    for reader in readers:
        assert reader.is_alive()
        reader.kill()
        reader.join()
    assert used(tmp_path) <= 250 * 1024
    assert_same(open_source(url, remote=cached(tmp_path, 250)), local)


def test_a_damaged_cache_is_read_anew(shards, url, tmp_path):
    local = open_source(shards)
    assert_same(open_source(url, remote=cached(tmp_path)), local)
    for file in (tmp_path / "shards").iterdir():
        if file.name != "used":
            data = bytearray(file.read_bytes())
            data[5000:9000] = bytes(4000)  # as a machine leaves it that lost its power
            file.write_bytes(data)
    assert_same(open_source(url, remote=cached(tmp_path)), local)


def test_what_nobody_uses_makes_room(shards, url, tmp_path):
    source, folder = open_source(url, remote=cached(tmp_path, 300)), tmp_path / "shards"
    for name in ("old", "new"):
        (folder / name).write_bytes(bytes(2**17))
    os.utime(folder / "old", (time.time() - 7200, time.time() - 7200))
    (folder / "used").write_bytes((2**18).to_bytes(8, "little"))
    assert_same(source, open_source(shards))
    assert used(tmp_path) <= 300 * 1024
    assert (folder / "old").stat().st_size == 0 and (folder / "new").stat().st_size == 2**17


def test_another_content_at_the_same_address(shards, serve, tmp_path):
    served, options = serve(tmp_path / "www"), cached(tmp_path / "cache")
    for seed in (0, 1):
        write_shards(
            open_source(f"shapes://{tmp_path}/{seed}?train=8,val=8,size=16,seed={seed}", download=True),
            tmp_path / f"w{seed}/train",
            8,
        )
        (tmp_path / f"w{seed}").rename(tmp_path / "www")
        assert_same(open_source(served.url, remote=options), open_source(tmp_path / "www"))
        (tmp_path / "www").rename(tmp_path / f"old{seed}")


def test_a_full_disk_or_a_folder_that_cannot_be_written(shards, url, tmp_path, monkeypatch, caplog):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    source = open_source(url, remote=cached(tmp_path / "cache"))
    monkeypatch.setattr(remote_cache.CachedShard, "put", full)
    assert_same(source, open_source(shards))
    (said,) = [record.message for record in caplog.records if "cannot be written" in record.message]
    assert said.endswith("([Errno 28] No space left on device); images are read from the server")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"the cache .* cannot be written .*; give a folder on a local disk"):
        open_source(url, remote=cached(tmp_path / "file"))


def test_a_page_where_an_index_was_asked_for(shards, serve, tmp_path):
    """Some servers answer any address with a page: beside a pattern that is no index, in a folder it is a damaged one."""
    (tmp_path / "www").mkdir()
    for file in (shards / "train").glob("*.tar"):
        os.link(file, tmp_path / "www" / file.name)
    (tmp_path / "www/index.npz").write_text("<html>nothing here</html>")
    served = serve(tmp_path / "www")
    assert len(open_source(f"{served.url}/train-{{000000..000001}}.tar")) == IMAGES
    with pytest.raises(ValueError, match=r"index\.npz: not an index \(BadZipFile"):
        open_source(served.url)
    np.savez(tmp_path / "www/index.npz", other=np.arange(3))
    assert len(open_source(f"{served.url}/train-{{000000..000001}}.tar")) == IMAGES
    with pytest.raises(ValueError, match=r"index\.npz: not an index \(.*write it again, or name the shards"):
        open_source(served.url)
