from __future__ import annotations

import pytest
import torch

from distattn.kernels.aten import Aten
from distattn.kernels.bands import Band, Bands
from distattn.kernels.contract import Scores
from distattn.kernels.timed import Busy, Stopwatch, Timed

BANDS = Bands([Band(0, 10, 0, 10, hi=0), Band(10, 12, 3, 7)])
PAIRS = 55 + 8


def launches(backend: Aten | Timed, device: str = "cpu") -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(12, heads, d, generator=g).to(device) for heads, d in ((4, 8), (2, 8), (2, 6), (4, 6)))
    state = backend.forward(q, k, v, BANDS, Scores(0.3))
    sums = [torch.zeros_like(x) for x in (q, k, v)]
    backend.backward(dout, q, k, v, (dout * state.o).sum(-1), state.lse, BANDS, Scores(0.3), *sums)
    return [*state, *sums]


def test_what_is_timed_is_the_same_and_its_work_is_counted() -> None:
    stopwatch = Stopwatch()
    timed = Timed(Aten(), stopwatch)
    assert all(torch.equal(a, b) for a, b in zip(launches(timed), launches(Aten()), strict=True))
    busy = stopwatch.take()
    assert busy.work == 4 * PAIRS * (2 * (8 + 6) + 2 * (3 * 8 + 2 * 6))
    assert busy.nanoseconds > 0 and 0 < busy.elapsed < 10e9
    assert stopwatch.take() == Busy(0, 0, 0)


def test_neither_time_outside_of_launches_counts_nor_what_others_take_within(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, thread = [0], [0]
    monkeypatch.setattr("time.perf_counter_ns", lambda: clock[0])
    monkeypatch.setattr("time.thread_time_ns", lambda: thread[0])

    class Slow(Aten):
        def forward(self, *arguments):  # type: ignore[override]
            clock[0] += 20
            thread[0] += 7
            return super().forward(*arguments)

    stopwatch = Stopwatch()
    for _ in range(2):
        launches(Timed(Slow(), stopwatch))
        clock[0] += 1000
        thread[0] += 1000
    busy = stopwatch.take()
    assert (busy.nanoseconds, busy.elapsed) == (14, 40)


@pytest.mark.gpu
def test_on_a_gpu_launches_lie_between_events() -> None:
    from distattn.kernels.triton_backend import TritonBackend

    stopwatch = Stopwatch()
    launches(Timed(TritonBackend(), stopwatch), "cuda")
    torch.cuda.synchronize()
    busy = stopwatch.take()
    assert busy.work == 4 * PAIRS * (2 * (8 + 6) + 2 * (3 * 8 + 2 * 6)) and busy.elapsed == busy.nanoseconds > 0
