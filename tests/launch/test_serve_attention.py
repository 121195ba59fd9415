"""The launcher of attention servers, and a training run that loses one in the middle of a step."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from distattn.launch.serve_attention import main, read_address
from distattn.metrics import read
from distattn.parallelize import make_world
from distattn.trainer import Trainer
from tests.distattn.small_run import small_config, small_tokens
from tests.workers import Pool

START = "import sys; from distattn.launch.serve_attention import main; sys.exit(main())"


@contextmanager
def server(*words: str) -> Iterator[subprocess.Popen[str]]:
    """A launcher in a process of its own, which is gone afterwards."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
    command = [sys.executable, "-c", START, *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ended(process: subprocess.Popen[str], seconds: float = 30.0) -> tuple[int, str]:
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said


def train(rank: int, world: int, folder: Path, store: str, victim: int | None) -> list[float]:
    """The losses of a small run; ``victim`` is killed in its fourth step, right after a call was announced."""
    from distattn.parallel.pool import Pool as Servers

    publish = Servers._publish
    layers, killed_at = 2, 3 * 4 + 2

    def publish_and_kill(self, call, ticket):
        publish(self, call, ticket)
        if victim is not None and rank == 0 and call.number == killed_at and not killed:
            killed.append(call.number)
            os.kill(victim, signal.SIGKILL)

    killed: list[int] = []
    Servers._publish = publish_and_kill  # type: ignore[method-assign]
    try:
        options = {"parallel__servers": 2, "parallel__pool_store": store, "parallel__timeout": 60.0, "model__layers": layers}
        config = small_config(folder, world, parallel__schedule="disaggregate", parallel__smallest=4, **options)
        trainer = Trainer(config, make_world(config, torch.device("cpu")))
        trainer.train()
        trainer.cp.close()
    finally:
        Servers._publish = publish  # type: ignore[method-assign]
    assert victim is None or rank or killed
    return [row["loss"] for row in read(folder / "run" / "metrics.jsonl") if "loss" in row]


def relative(found: list[float], wanted: list[float]) -> float:
    assert len(found) == len(wanted) > 0
    return max(abs(a - b) / b for a, b in zip(found, wanted, strict=True))


def test_no_step_is_lost_with_a_server_that_is_killed_in_the_middle_of_one(gloo: Pool, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("whole", "fault", "alone")}
    for folder in folders.values():
        small_tokens(folder / "tokens")
    store = f"127.0.0.1:{free_port()}"
    with server("--store", store) as first, server("--store", store, "--wait", "100") as second:  # before any trainer
        whole = gloo(2).run(train, folders["whole"], store, None, timeout=90)[0]
        fault = gloo(2).run(train, folders["fault"], store, second.pid, timeout=90)[0]
        assert ended(second)[0] == -signal.SIGKILL
        first.send_signal(signal.SIGTERM)
        code, said = ended(first)
    assert code == 0 and said.count("the trainers are done") == 2 and "epoch 2: rank 2 of 2 trainers and 1 servers" in said, said
    config = small_config(folders["alone"])
    Trainer(config, make_world(config, torch.device("cpu"))).train()
    alone = [row["loss"] for row in read(folders["alone"] / "run" / "metrics.jsonl") if "loss" in row]
    # Six steps of float32 training, in which sums are taken in another order: not bitwise.
    assert relative(fault, whole) < 1e-5 and relative(whole, alone) < 1e-5, (fault, whole, alone)


def test_a_server_that_nobody_wants_ends_with_a_word(tmp_path: Path) -> None:
    store = f"127.0.0.1:{free_port()}"
    with server("--store", store, "--wait", "0.2") as late, server("--store", str(tmp_path / "pool_store")) as patient:
        code, said = ended(late)
        assert code == 1 and f"error: no trainers at {store} within 0.2 s" in said, said
        assert patient.stdout is not None and "waiting for trainers at" in patient.stdout.readline()
        patient.send_signal(signal.SIGTERM)
        assert ended(patient)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--store", "here"], "--store='here' is no address. Write HOST:PORT"),
        (["--store", "here:0"], "--store here:0 must name a port"),
        (["--store", "auto"], "--store auto must name a port"),
        (["--store", "here:1", "--wait", "-1"], "--wait -1.0 must be 0 or more"),
        (["--store", "here:1", "--threads", "-1"], "--threads -1 must be 0 or more"),
        (["--store", "here:1", "--backend", "fast"], "There is no backend 'fast'"),
    ],
)
def test_mistakes_end_with_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        assert main(words) == 2
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGINT), before, strict=True):
            signal.signal(number, handler)
    assert message in capsys.readouterr().err


def test_an_address_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "pool_store"
    assert read_address(str(path)) is None
    path.write_text("node3:29511\n")
    assert str(read_address(str(path))) == "node3:29511"
    path.write_text("nonsense")
    with pytest.raises(ValueError, match="the address in .*nonsense"):
        read_address(str(path))


def other_version(port: int, answers: list[object]) -> None:
    from distattn.parallel.pool_board import Address
    from distattn.parallel.pool_server import AttentionServer

    while True:
        try:
            answers.append(AttentionServer(Address("127.0.0.1", port), "0.0.0").serve())
            return
        except RuntimeError:
            time.sleep(0.05)


def test_a_server_of_another_version_is_refused() -> None:
    from distattn.parallel.comm import SoloCommunicator
    from distattn.parallel.pool import Pool as Servers
    from distattn.parallel.pool_server import Ending

    answers: list[object] = []

    def announce(address: str) -> None:
        arguments = (int(address.rpartition(":")[2]), answers)
        threading.Thread(target=other_version, args=arguments, daemon=True).start()

    with pytest.raises(ValueError, match="Only 0 of 1 attention servers came"):
        Servers(SoloCommunicator(timeout=2.0), 1, "127.0.0.1:0", "1.0", announce=announce)
    deadline = time.monotonic() + 5
    while not answers and time.monotonic() < deadline:
        time.sleep(0.05)
    assert answers[0].ending == Ending.REFUSED and "version 0.0.0 of distattn, the trainers 1.0" in answers[0].why  # type: ignore[attr-defined]
