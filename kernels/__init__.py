"""Attention on one device: the contract, its backends, and :func:`choose`, which says who runs and why not a faster one."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from distattn.kernels.contract import Backend, Scores

RANKING = ("gluon", "gluon_ordered", "gluon_fused", "cudnn", "flash", "triton", "aten", "reference")  # fastest first
# Only by name or by a table: they round, sum in no fixed order, or are not known to be faster.
ON_DEMAND = ("gluon_ordered", "gluon_fused", "cudnn", "flash")


@dataclass(frozen=True)
class Choice:
    """The backend to call, and one sentence against each better-ranked one, to be printed once."""

    backend: Backend
    reasons: list[str] = field(default_factory=list)


def load(name: str) -> Backend:
    """The backend called ``name``. Backends are imported here and not before; none needs its package to be imported."""
    if name in ("gluon", "gluon_ordered", "gluon_fused"):
        from distattn.kernels.gluon_backend import GluonBackend

        return GluonBackend(deterministic=name != "gluon_fused", ordered=name == "gluon_ordered")
    if name in ("cudnn", "flash"):
        from distattn.kernels import cuda_library

        return cuda_library.Cudnn() if name == "cudnn" else cuda_library.Flash()
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


def choose(q: Tensor, k: Tensor, v: Tensor, scores: Scores, prefer: str | None = None, deterministic: bool = True) -> Choice:
    """The fastest backend that takes these tensors.

    On the hardware of the table in :mod:`distattn.kernels.measured` that may be a choice anew for every kind of call.

    Args:
        prefer: a name from :data:`RANKING` insists on that backend. Triton on CPU tensors (its interpreter, for tests) runs
            only when asked for.
        deterministic: False allows backends whose gradients differ in their last bits from run to run.

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
        if name in ON_DEMAND:
            continue
        if name in ("gluon", "triton") and q.device.type == "cpu":
            reasons.append(f"{name}: not considered for CPU tensors")
            continue
        backend = load(name)
        reason = backend.reject(q, k, v, scores)
        if reason is None:
            return Choice(_by_table(backend, q, k, v, scores, deterministic) or backend, reasons)
        reasons.append(f"{name}: {reason}")
    raise AssertionError("the reference takes everything")


def _by_table(first: Backend, q: Tensor, k: Tensor, v: Tensor, scores: Scores, deterministic: bool) -> Backend | None:
    """A choice anew for every call, where the table was made for this hardware and lets another than ``first`` win some."""
    if q.device.type != "cuda":
        return None
    from distattn.kernels.measured import Measured, capability, read

    table = read()
    if capability(q.device) != table.capability:
        return None
    others = [
        load(name) for name in (*ON_DEMAND, "triton") if name != first.name and (name != "gluon_fused" or not deterministic)
    ]
    candidates = (first, *(backend for backend in others if backend.reject(q, k, v, scores) is None))
    measured = Measured(candidates, table, deterministic)
    return measured if measured.varies(q.shape[2], v.shape[2]) else None
