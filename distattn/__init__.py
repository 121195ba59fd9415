"""Attention over one sequence that is sharded over many devices.

The public names are loaded when they are first used (PEP 562): ``import distattn.kernels`` loads neither plans nor a model.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distattn.attention import ContextParallel
    from distattn.decode import decode_attention
    from distattn.kv_cache import KVCache, KVShard
    from distattn.parallel.auto import Auto
    from distattn.parallel.cluster import load_cluster
    from distattn.parallel.mask import causal, chunked, documents, full, prefix_lm, sliding_window, union
    from distattn.parallel.plan import Plan
    from distattn.parallel.shape import Shape
    from distattn.parallel.strategy import Balance, Strategy
    from distattn.parallel.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Auto",
    "Balance",
    "ContextParallel",
    "KVCache",
    "KVShard",
    "Plan",
    "Shape",
    "Strategy",
    "__version__",
    "causal",
    "chunked",
    "decode_attention",
    "documents",
    "full",
    "load_cluster",
    "prefix_lm",
    "sliding_window",
    "union",
    "verify",
]

_HOME = {
    "Auto": "distattn.parallel.auto",
    "Balance": "distattn.parallel.strategy",
    "ContextParallel": "distattn.attention",
    "KVCache": "distattn.kv_cache",
    "KVShard": "distattn.kv_cache",
    "Plan": "distattn.parallel.plan",
    "Shape": "distattn.parallel.shape",
    "Strategy": "distattn.parallel.strategy",
    "decode_attention": "distattn.decode",
    "load_cluster": "distattn.parallel.cluster",
    "verify": "distattn.parallel.verify",
    **dict.fromkeys(("causal", "chunked", "documents", "full", "prefix_lm", "sliding_window", "union"), "distattn.parallel.mask"),
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'distattn' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
