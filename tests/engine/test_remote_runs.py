"""Runs on remote shards: the losses of a run on local ones, also after a server that went away."""

import json

import pytest

from crossbatch.data.sources import open_source
from crossbatch.data.sources.shard_writer import write_shards
from tests.jobs import metrics
from tests.served import Served
from tests.small_runs import BASE, LARS, RESNET, fsdp

pytest.importorskip("aiohttp", reason="aiohttp is not installed (the extra remote)")
SECRET = "verysecret"


@pytest.mark.long
def test_a_run_without_its_server_stops_and_resumes_as_if_nothing_had_been(tmp_path, nursery):
    """The second run loses its server for good in the first epoch: exit code 3, one message, and the same losses at the end."""
    write_shards(open_source("synthetic://48?size=20"), tmp_path / "shards/train", 24)
    served = Served(tmp_path / "shards", "--requests=40")  # of them about 12 to open
    waits = "crossbatch.watch.timeout_s=20"

    def run(name: str, data) -> tuple[int, str]:
        # Read by the trainer; workers that read from a server are in tests/data/test_remote.py.
        settings = (*BASE, *RESNET, *LARS, *fsdp(1), f"crossbatch.data.path={data}", waits)
        flags = [f"--out={tmp_path / name}", "--steps=8", *(f"--set={setting}" for setting in settings)]
        job = nursery.start(tmp_path / f"logs-{name}", 1, *flags)
        return job.wait()[0], job.output()

    try:
        assert run("local", tmp_path / "shards")[0] == 0
        code, said = run("remote", served.url)
        assert code == 3 and said.count("stopped (rank 0): ") == 1, said
        assert f"crossbatch.data: {served.url}/train/" in said and "503" in said and "resume" in said
        served.stop()
        served.flags = ()
        served.start()
        code, said = run("remote", served.url)
        assert code == 0, said
    finally:
        served.stop()
    local, remote = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("local", "remote"))
    assert remote == local and len(local) == 8
    facts = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("local", "remote")]
    assert facts[1]["crossbatch"]["data"]["path"] == served.url


def test_credentials_in_a_path_leave_no_trace(tmp_path, nursery):
    data = f"--data=https://me:{SECRET}@host/imagenet"
    job = nursery.start(tmp_path / "logs", 1, data, f"--out={tmp_path / 'run'}")
    assert job.wait() == [2] and "the path holds credentials" in job.output() and SECRET not in job.output()
    assert not (tmp_path / "run").exists()
