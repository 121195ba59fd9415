"""Attention on one device: the contract, its backends, and :func:`choose`, which says who runs and why not a faster one."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from distattn.kernels.contract import Backend, Scores

RANKING = ("triton", "aten", "reference")  # fastest first


@dataclass(frozen=True)
class Choice:
    """The backend to call, and one sentence against each better-ranked one, to be printed once."""

    backend: Backend
    reasons: list[str] = field(default_factory=list)


def load(name: str) -> Backend:
    """The backend called ``name``. Backends are imported here and not before; none needs its package to be imported."""
    if name == "triton":
        from distattn.kernels.triton_backend import TritonBackend

        return TritonBackend()
    if name == "aten":
        from distattn.kernels.aten import Aten

        return Aten()
    if name == "reference":
        from distattn.kernels.reference import Reference

        return Reference()
    raise ValueError(f"There is no backend {name!r}. Use one of {', '.join(RANKING)}, or None for the fastest that can.")


def choose(q: Tensor, k: Tensor, v: Tensor, scores: Scores, prefer: str | None = None) -> Choice:
    """The fastest backend that takes these tensors.

    Args:
        prefer: a name from :data:`RANKING` insists on that backend. Triton on CPU tensors (its interpreter, for tests) runs
            only when asked for.

    Raises:
        ValueError: ``prefer`` names no backend, or one that cannot take the call; the message says why.
    """
    if prefer is not None:
        backend = load(prefer)
        reason = backend.reject(q, k, v, scores)
        if reason is not None:
            found = ", ".join(f"{n} {list(x.shape)} {x.dtype} on {x.device}" for n, x in (("q", q), ("k", k), ("v", v)))
            raise ValueError(
                f"Backend {prefer!r} was asked for but {reason}. Found {found}. Leave the choice open, or change them."
            )
        return Choice(backend)
    reasons = []
    for name in RANKING:
        if name == "triton" and q.device.type == "cpu":
            reasons.append("triton: not considered for CPU tensors")
            continue
        backend = load(name)
        reason = backend.reject(q, k, v, scores)
        if reason is None:
            return Choice(backend, reasons)
        reasons.append(f"{name}: {reason}")
    raise AssertionError("the reference takes everything")
