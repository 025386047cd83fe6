"""`nsa batch --engine ray` on processes of this machine: the local engine's bytes, also when workers die."""

import importlib.util
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

HAS_RAY = importlib.util.find_spec("ray") is not None
NEEDS_RAY = pytest.mark.skipif(not HAS_RAY, reason="Ray is not installed; pip install 'nsa[ray]'")


@pytest.fixture
def jobs(tmp_path, monkeypatch) -> list[dict]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray writes one into the home directory
    for i in range(4):
        Path(f"{i}.txt").write_text(
            "".join(f"line {k} of {i}: the quick fox jumps over dog {k * i}\n" for k in range(30))
        )
    jobs = [{"id": i, "paths": [f"{i % 4}.txt"], "question": f"who is {i}?"} for i in range(60)]
    jobs[9]["paths"] = ["gone.txt"]
    Path("jobs").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    return jobs


def records(name: str) -> int:
    return Path(name).read_bytes().count(b"\n") if Path(name).exists() else 0


def children() -> list[psutil.Process]:
    """The processes of workers, below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::RemoteWorker" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


@NEEDS_RAY
def test_the_cluster_writes_what_the_local_engine_does_though_workers_die(nsa, jobs):
    options = ["--reproducible", "--max-tokens", "60", "--threads", "1"]
    assert nsa("batch", "jobs", "-o", "local", *options).code == 7
    command = [sys.executable, "-m", "nsa_cli", "batch", "jobs", "-o", "ray", "--engine", "ray", "--workers", "2"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([*command, *options, "--no-cache"], **pipes) as process:
        for least in (1, 20):  # one of the workers, twice
            while process.poll() is None and records("ray") < least:
                time.sleep(0.01)
            for worker in children()[:1]:
                os.kill(worker.pid, signal.SIGKILL)
        out, err = process.communicate()
    assert out == ""  # what Ray says is not among the records
    assert process.returncode == 7, err
    assert "1 of 60 jobs failed; the first, 9: no such file" in err and "try 1 of 3" in err
    assert Path("ray").read_bytes() == Path("local").read_bytes()


@NEEDS_RAY
def test_a_job_that_kills_every_worker_is_an_error_record(jobs):
    code = """
import os
from nsa_cli import batch, cluster
record = batch.Worker.record

class Fragile(cluster.RemoteWorker):
    def record(self, task, documents):
        if task.job.id == 5:
            os._exit(1)
        return {"id": task.job.id, "answer": documents[0].path}

cluster.RemoteWorker = Fragile
from nsa_cli.cli import run
raise SystemExit(run(["batch", "jobs", "-o", "out", "--engine", "ray", "--workers", "1"]))
"""
    Path("jobs").write_text("".join(json.dumps(job) + "\n" for job in jobs[:8]))
    run = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    records = [json.loads(line) for line in Path("out").read_text().splitlines()]
    assert run.returncode == 7 and "1 of 8 jobs failed; the first, 5: 3 workers died" in run.stderr, run.stderr
    assert [record.get("answer") for record in records] == [None if i == 5 else f"{i % 4}.txt" for i in range(8)]


@pytest.fixture
def cluster(monkeypatch):
    """A running cluster that asks for a token: its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    ray += ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with (
        tempfile.TemporaryDirectory(prefix="ray") as folder,  # tmp_path is too long for its sockets
        subprocess.Popen([*ray, f"--temp-dir={folder}"], **quiet) as head,
    ):
        while head.poll() is None and not listens(port):
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"
        head.terminate()


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@NEEDS_RAY
def test_a_running_cluster_writes_the_same(nsa, jobs, cluster):
    options = ["--reproducible", "--max-tokens", "4", "--threads", "1"]
    assert nsa("batch", "jobs", "-o", "local", *options).code == 7
    command = [sys.executable, "-m", "nsa_cli", "batch", "jobs", "-o", "ray", "--engine", "ray", "--address", cluster]
    run = subprocess.run([*command, *options, "--workers", "2"], capture_output=True, text=True)
    assert run.returncode == 7 and "2 workers, 1 threads each, on 1 machines" in run.stderr, run.stderr
    assert Path("ray").read_bytes() == Path("local").read_bytes()


@NEEDS_RAY
def test_no_cluster_at_the_address_is_one_line(nsa, jobs):
    run = nsa("batch", "jobs", "--engine", "ray", "--address", "127.0.0.1:1")
    assert (run.code, run.out, run.err.count("\n")) == (1, "", 1) and "no Ray cluster at 127.0.0.1:1" in run.err


def test_without_ray_it_says_how_to_get_it(nsa, jobs, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    run = nsa("batch", "jobs", "--engine", "ray")
    assert (run.code, run.out, run.err) == (1, "", "nsa: Ray is not installed; run: pip install 'nsa[ray]'\n")


def test_options_of_a_cluster_are_for_a_cluster(nsa, jobs):
    run = nsa("batch", "jobs", "--workers", 2)
    assert run.code == 2 and "--address and --workers are for --engine ray" in run.err
