"""Kernels are slow on a busy machine: hypothesis must not judge an example by its time."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("kernels", deadline=None)
settings.load_profile("kernels")
