"""Reads tar shards from object stores and web servers by range requests, through fsspec.

    s3://bucket/imagenet                       a folder with train/ and val/, or of shards, as on a disk
    https://host/imagenet                      the same; a web server lists nothing, so index.npz must be there
    https://host/train-{0000..0099}.tar        the shards of a pattern, as webdataset writes it; also with s3:// and gs://

An image and its label lie side by side, so one request gets both. `read_ahead` starts the requests for images that will be
asked for next; fsspec's thread waits for all of a process. A request that is not answered, or with 408, 429 or 5xx, is repeated
with back-off until `retry_s` are over, which raises ImagesLost: no image is given up because a server was away.

`fsspec` has caches, which serve for scanning. They do not for single images: `simplecache` and `filecache` fetch whole shards
before the first byte, `blockcache` keeps its books in a file that processes overwrite for each other, and no size is bounded.
So `remote_cache` keeps images on a disk.
"""

import asyncio
import functools
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast
from urllib.request import getproxies

import fsspec
import numpy as np
from fsspec.config import conf
from fsspec.spec import AbstractBufferedFile
from torch.utils.data import get_worker_info

from crossbatch.data.decode import ImagesLost
from crossbatch.data.sources.listing import Arrays, Names, kind_of, unpack
from crossbatch.data.sources.location import Location, RemoteOptions
from crossbatch.data.sources.remote_cache import CachedShard, ImageCache
from crossbatch.data.sources.shards import INDEX, is_shard

Answer = TypeVar("Answer")

_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws; for a public bucket FSSPEC_S3_ANON=true",
    "gs": "gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS",
    "http": "~/.netrc, or headers in FSSPEC_HTTP",
    "https": "~/.netrc, or headers in FSSPEC_HTTPS",
}
_REQUESTS = 32  # of a process at a time
_REQUEST_S = 30.0  # that one may take
_INDEX_S = 600.0  # that index.npz may take
_OPENING_S = 10.0  # for how long the first requests are repeated: a wrong name should not take minutes
_LONGEST_PAUSE_S = 5.0
_QUIET_S = 2.0  # before a repeated request is worth a line in the log, of which there is one in so many seconds:
_TOLD_S = 60.0
_PIECE = 2**19  # bytes that a request gets at least while the cache has room
_SCANNED = 2**21  # bytes at a time
_AHEAD = 1024  # images that were asked for and not yet taken, at most
_OPEN_FILES = 64  # of the cache
_random = Random()  # spreads the repeated requests; no result depends on it
_log = logging.getLogger(__name__)


class RemoteFolder:
    """Reads the shards of a remote folder, or those of `names` in it; a `ShardFolder`.

    Methods raise ValueError where the server cannot be reached, refuses, or does not know ranges.
    """

    def __init__(self, url: str, options: RemoteOptions, names: Sequence[str] = ()):
        self.url, self.options, self._names = url, options, sorted(set(names))
        self._scheme = url.partition("://")[0]
        self._lists = not self._names and not self._scheme.startswith("http")

    def __str__(self) -> str:
        return self.url

    @property
    def index_cache(self) -> Path | None:
        """Return where the result of a scan is kept for other runs, too; None if there is no such place."""
        return self.options.cache_dir and self.options.cache_dir / "index"

    @functools.cached_property
    def files(self) -> dict[str, tuple[int, int]]:
        """Return {name: (size, a number that changes with the content)} of all files there, sorted by name."""
        with _opening():
            if self._lists:
                listed = self._ask(lambda fs: fs._ls(self.url, detail=True), self.url, _OPENING_S)
                try:
                    entries = {entry["name"].rpartition("/")[2]: entry for entry in listed.result()}
                except FileNotFoundError:
                    return {}
            else:
                index = None if self._names else self.index()
                names = self._names if index is None else Names(index, "shards").unpack()
                asked = {name: self._ask_file(name, lambda fs, url: fs._info(url), _OPENING_S) for name in names}
                entries = {name: future.result() for name, future in asked.items()}
        files = {name: one for name, one in entries.items() if name and one["type"] == "file"}
        for name, entry in files.items():
            if entry.get("size") is None:
                raise ValueError(f"{self.url}/{name}: the server does not say how large it is; use one that does")
        return {name: (int(entry["size"]), _tag(entry)) for name, entry in sorted(files.items())}

    def exists(self) -> bool:
        """Return whether there is a shard, or on a web server an index."""
        if self._lists or self._names:
            return any(name in self._names or is_shard(name) for name in self.files)
        return self.index() is not None

    def shards(self) -> dict[str, tuple[int, int]]:
        """Return {name: (size, a number that changes with the content)} of the tar files, sorted by name."""
        found = {name: facts for name, facts in self.files.items() if name in self._names or is_shard(name)}
        if found:  # of a server without ranges, every image would bring its whole shard
            with _opening():
                self.request(next(iter(found)), 0, 512, _OPENING_S).result()
        return found

    def index(self) -> Arrays | None:
        """Return the content of index.npz; None if there is none, or, beside a pattern, if it is of other shards."""
        return self._index

    @functools.cached_property
    def _index(self) -> Arrays | None:
        if self._lists and INDEX not in self.files:
            return None
        with _opening():
            try:
                content = self._ask_file(INDEX, lambda fs, url: fs._cat_file(url), _OPENING_S, _INDEX_S).result()
                index = unpack(content)
                shards = Names(index, "shards").unpack()
            except FileNotFoundError:
                return None
            except (_Denied, KeyError, ValueError) as error:
                if self._names:  # some servers answer 403, or with a page, where there is no file
                    return None
                if isinstance(error, ImagesLost):
                    raise
                raise ValueError(
                    f"{self.url}/{INDEX}: not an index ({error}); write it again, or name the shards"
                ) from error
        return index if self._names in ([], shards) else None

    def beside(self) -> Counter[str]:
        """Count the files in the folder by kind, without hidden ones."""
        return Counter(kind_of(name) for name in self.files if not name.startswith("."))

    def open(self, name: str) -> BinaryIO:
        """Open a shard to scan it, in large pieces, with the next one read ahead."""
        size, _ = self.files[name]
        options = {"cache_type": "background", "block_size": _SCANNED, "cache_options": {"maxblocks": 4}}
        return cast(BinaryIO, _ScannedFile(self, name, size=size, **options))

    def images(self, shards: Sequence[str], ends: np.ndarray, spans: np.ndarray) -> "RemoteImages":
        """Return a reader of images: those before `ends[i]` lie in `shards[i]` (or earlier), at the bytes `spans` [n, 2]."""
        return RemoteImages(self, shards, ends, spans)

    def request(self, name: str, begin: int, end: int, retry_s: float | None = None) -> "Future[bytes]":
        """Begin to read bytes of a shard. The result raises FileNotFoundError or ImagesLost."""

        async def get(fs: Any, url: str) -> bytes:
            data = await fs._cat_file(url, start=begin, end=end)
            if len(data) > end - begin:
                raise _Refused(
                    f"{url}: the server sends whole files where a range is asked for; use one that knows ranges"
                )
            return data

        return self._ask_file(name, get, self.options.retry_s if retry_s is None else retry_s)

    def _ask_file(
        self, name: str, call: Callable[[Any, str], Awaitable[Answer]], retry_s: float, request_s: float = _REQUEST_S
    ) -> "Future[Answer]":
        url = f"{self.url}/{name}"
        return self._ask(lambda fs: call(fs, url), url, retry_s, request_s)

    def _ask(
        self, call: Callable[[Any], Awaitable[Answer]], url: str, retry_s: float, request_s: float = _REQUEST_S
    ) -> "Future[Answer]":
        """Begin a request, which is repeated for `retry_s` seconds. Raises ValueError if a package is missing."""
        fs, slots = _connection(self._scheme, os.getpid())
        return asyncio.run_coroutine_threadsafe(_persist(lambda: call(fs), slots, url, retry_s, request_s), fs.loop)

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "_index"}


class _ScannedFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        with _opening():
            return self.fs.request(self.path, start, end).result()


class _Piece(NamedTuple):
    """Holds bytes of a shard that were asked for: the whole of the images `first` to `last` (excluded)."""

    first: int
    last: int
    begin: int  # of the bytes in the shard
    data: "Future[bytes]"


class RemoteImages:
    """Reads the images of a `RemoteFolder`, ahead and from its cache; an `ImageBytes`."""

    def __init__(self, folder: RemoteFolder, shards: Sequence[str], ends: np.ndarray, spans: np.ndarray):
        self._folder, self._shards, self._ends, self._spans = folder, shards, ends, spans
        options = folder.options
        self._cache = options.cache_dir and ImageCache(options.cache_dir, int(options.cache_gib * 2**30))

    def reader(self, index: int) -> Callable[[int, int], bytes]:
        """Wait for the bytes of an image, and return a function that reads (offset, length) of them.

        Raises FileNotFoundError and ImagesLost.
        """
        begin, end = self._spans[index].tolist()
        kept, number = self._kept(index)
        data = kept and kept.read(number, begin, end)
        piece = self._coming.pop(index, None)
        if data is None:
            piece = piece or self._request(index)
            whole = piece.data.result()
            if kept and self._cache and len(whole) == self._spans[piece.first : piece.last, 1].max() - piece.begin:
                first = number - (index - piece.first)
                self._cache.write(kept, first, whole, piece.begin, self._spans[piece.first : piece.last])
            data = whole[begin - piece.begin : end - piece.begin]
        return lambda offset, length: data[max(offset - begin, 0) : max(offset - begin, 0) + length]

    def read_ahead(self, indices: Sequence[int]) -> None:
        """Begin to read images, unless that has begun already or the cache has them."""
        pieces = {}
        for index in map(int, indices):
            if index in self._coming:
                continue
            if index not in pieces:
                kept, number = self._kept(index)
                if kept and kept.has(number):
                    continue
                piece = self._request(index)
                pieces.update(dict.fromkeys(range(piece.first, piece.last), piece))
            self._coming[index] = pieces[index]
        for left in list(self._coming)[:-_AHEAD]:  # of an iteration that was given up
            self._coming.pop(left, None)

    def _request(self, index: int) -> _Piece:
        shard, before, after = self._place(index)
        first, last = index, index + 1
        if self._cache and self._cache.has_room:
            begins, block = self._spans[before:after, 0], self._spans[index, 0] // _PIECE
            first = min(first, before + int(np.searchsorted(begins, block * _PIECE)))
            last = max(last, before + int(np.searchsorted(begins, (block + 1) * _PIECE)))
        begin, end = int(self._spans[first:last, 0].min()), int(self._spans[first:last, 1].max())
        return _Piece(first, last, begin, self._folder.request(self._shards[shard], begin, end))

    def _place(self, index: int) -> tuple[int, int, int]:
        """Return the number of an image's shard, and the first and last (excluded) image in it."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, int(self._ends[shard - 1]) if shard else 0, int(self._ends[shard])

    def _kept(self, index: int) -> tuple[CachedShard | None, int]:
        """Return the cached part of an image's shard, if there is a cache, and the image's number in it."""
        shard, before, _ = self._place(index)
        return (self._open(shard) if self._cache else None), index - before

    def _open_cached(self, shard: int) -> CachedShard:
        name, (size, tag) = self._shards[shard], self._folder.files[self._shards[shard]]
        digest = sha256(f"{self._folder.url}/{name} {size} {tag}".encode()).hexdigest()[:32]
        assert self._cache
        return self._cache.open(digest, size)

    @functools.cached_property
    def _open(self) -> Callable[[int], CachedShard]:
        return functools.lru_cache(_OPEN_FILES)(self._open_cached)

    @property
    def _coming(self) -> dict[int, _Piece]:
        """Return the pieces on their way, by image; those of the process that this one was forked from never come."""
        if getattr(self, "_process", None) != os.getpid():
            self._process, self._pieces = os.getpid(), {}
        return self._pieces

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name not in ("_open", "_process", "_pieces")}


class _Denied(ImagesLost):
    """Raised when the server denies access (401 or 403)."""


class _Refused(Exception):
    """Raised when the same request would fail again, so that it is not repeated."""


async def _persist(
    call: Callable[[], Awaitable[Answer]], slots: asyncio.Semaphore, url: str, retry_s: float, request_s: float
) -> Answer:
    """Return the answer to a request, which is repeated until it comes. Raises FileNotFoundError and ImagesLost."""
    started, pause_s = time.monotonic(), 0.1
    while True:
        try:
            async with slots:
                return await _within(request_s, call)
        except _Refused as error:
            raise ImagesLost(str(error)) from None
        except Exception as error:
            fault, status = _fault(error)
        what = f"{type(fault).__name__}: {_without_secrets(str(fault)) or 'no answer'}"
        if isinstance(fault, FileNotFoundError) or status in (404, 410):
            raise FileNotFoundError(f"{url}: no such file, folder or bucket; look at the address")
        if isinstance(fault, PermissionError) or status in (401, 403) or "Credential" in type(fault).__name__:
            ways = _CREDENTIALS[url.partition("://")[0]]
            raise _Denied(f"{url}: access denied ({what}); give credentials that may read it: {ways}")
        if status is not None and 400 <= status < 500 and status not in (408, 425, 429):
            raise ImagesLost(f"{url}: the server refuses ({what}); give another address")
        passed_s = time.monotonic() - started
        if passed_s + pause_s > retry_s:
            raise ImagesLost(
                f"{url}: no answer for {passed_s:.0f} s ({what}); look whether the server runs and can be reached"
            )
        if passed_s > _QUIET_S:
            _tell_once(f"{url}: no answer ({what}); trying again for up to {retry_s:.0f} s")
        await asyncio.sleep(pause_s * _random.uniform(0.5, 1))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


async def _within(seconds: float, call: Callable[[], Awaitable[Answer]]) -> Answer:
    """Return the answer to a request. Raises TimeoutError where it takes longer."""
    if sys.version_info < (3, 11):
        return await asyncio.wait_for(call(), seconds)
    async with asyncio.timeout(seconds):  # unlike `wait_for`, makes no task of each request
        return await call()


def _fault(error: Exception) -> tuple[BaseException, int | None]:
    """Return what went wrong, and the status of the HTTP answer if there was one."""
    cause = error.__cause__  # what fsspec's `http` takes for a file that is not there
    if isinstance(error, FileNotFoundError) and type(cause).__module__.partition(".")[0] in ("aiohttp", "builtins"):
        error = cause if isinstance(cause, Exception) else error
    answer = getattr(error, "response", None)  # of botocore
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
    status = status or getattr(error, "status", None) or getattr(error, "code", None)
    if str(error).startswith("Forbidden"):  # of gcsfs
        status = 403
    return error, status if isinstance(status, int) else None


def _without_secrets(text: str) -> str:
    """Return the first line of a message, its addresses without what follows the question mark: a server may redirect to
    addresses that are signed."""
    line = next(iter(text.splitlines()), "")
    return re.sub(r"(\w+://)[^/\s@]*@", r"\1", re.sub(r"\?[^\s'\")]*", "", line))[:300]


_told = [-_TOLD_S]


def _tell_once(message: str) -> None:
    """Log a warning unless there was one just now, or another worker process of the same loader does."""
    worker = get_worker_info()
    if (worker is None or worker.id == 0) and time.monotonic() - _told[0] >= _TOLD_S:
        _told[0] = time.monotonic()
        _log.warning("%s", message)


@functools.lru_cache(8)
def _connection(scheme: str, process: int) -> tuple[Any, asyncio.Semaphore]:
    """Return the file system of `scheme` for this process, and what limits its requests. Raises ValueError."""
    options: dict[str, Any] = {"use_listings_cache": False}
    if scheme.startswith("http"):
        given = conf.get(scheme, {}).get("client_kwargs", {})
        # With `trust_env`, aiohttp looks for proxies and into ~/.netrc at every request, in threads.
        netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
        options["client_kwargs"] = {"trust_env": bool(getproxies()) or netrc.exists(), **given}
    if scheme == "gs":
        # Or gcsfs asks by gRPC what kind of bucket it is, and waits a minute where that is not let through.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    try:
        return fsspec.filesystem(scheme, **options), asyncio.Semaphore(_REQUESTS)
    except ImportError as error:
        raise ValueError(
            f"{scheme}:// needs a package ({error}); install it: pip install 'crossbatch[remote]'"
        ) from error


@contextmanager
def _opening() -> Iterator[None]:
    """Raise ImagesLost as ValueError: while a data set is opened, a server that does not answer is wrong input."""
    try:
        yield
    except (ImagesLost, FileNotFoundError) as error:
        raise ValueError(str(error)) from None


def _tag(entry: dict[str, Any]) -> int:
    """Return a number that changes when a file does, of what its server says about it."""
    known = ("ETag", "etag", "generation", "LastModified", "updated", "Last-Modified")
    said = next((str(entry[name]) for name in known if entry.get(name)), "")
    return int.from_bytes(sha256(said.encode()).digest()[:7], "little")


def open_remote(where: Location, split: str, names: Sequence[str], options: RemoteOptions) -> RemoteFolder | None:
    """Return the shards of `split` ("train" or "eval"), which may lie in a folder of one of `names`; None if there are none.

    Raises ValueError if the server cannot be reached or refuses, or if nothing to train on is there.
    """
    url = f"{where.scheme}://{where.target}"
    given = where.options["eval"] if split == "eval" else ""
    if given:
        folder = url.rpartition("/")[0] if is_pattern(url) else url
        url = given if "://" in given else f"{folder}/{given}"
    if is_pattern(url):
        return _of_pattern(url, options) if given or split == "train" else None
    places = [url] if given else [f"{url}/{name}" for name in names] + [url] * (split == "train")
    for place in places:
        folder = RemoteFolder(place, options)
        if folder.exists():
            return folder
    if split == "eval" and not given:
        return None
    wanted = "index.npz, which a web server needs for it lists nothing" if where.scheme.startswith("http") else "*.tar"
    raise ValueError(
        f"{url}: no shards there, or no such bucket; expected {url}{'' if given else '/train'}/{wanted}, or a pattern such as "
        f"{url}/train-{{0000..0099}}.tar"
    )


def is_pattern(url: str) -> bool:
    """Return whether `url` is that of shards, not of a folder."""
    return "{" in url or is_shard(url.rpartition("/")[2])


def _of_pattern(url: str, options: RemoteOptions) -> RemoteFolder:
    base = url.partition("{")[0].rpartition("/")[0]
    return RemoteFolder(base, options, [one[len(base) + 1 :] for one in expand(url)])


def expand(pattern: str) -> list[str]:
    """Return the addresses that a pattern stands for: {0000..0099} counts, {a,b} lists, as in webdataset and the shell.

    Raises ValueError if it cannot be read.
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        if "{" in pattern or "}" in pattern:
            raise ValueError(
                f"{pattern} has a brace without its other half; write for example train-{{0000..0099}}.tar"
            )
        return [pattern]
    counted = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    options = found[1].split(",")
    if counted:
        first, last = int(counted[1]), int(counted[2])
        if last < first:
            raise ValueError(f"{pattern} counts down from {first} to {last}; write the smaller number first")
        options = [str(number).zfill(len(counted[1])) for number in range(first, last + 1)]
    elif len(options) < 2:
        raise ValueError(f"{pattern}: {{{found[1]}}} is neither a range nor a list; write for example {{0000..0099}}")
    return [one for option in options for one in expand(pattern[: found.start()] + option + pattern[found.end() :])]
