"""Masks written as short texts, for command lines and configuration files.

full    causal    window:4096    window:4096:sinks=4    window:512:symmetric    prefix:100    chunked:512
documents:5000,120,3072    documents:5000,120:window=64    documents:5000,120:full
"""

from __future__ import annotations

import difflib
from collections.abc import Callable

from distattn.parallel import mask as masks
from distattn.parallel.mask import Mask

FORMS = {
    "full": "full",
    "causal": "causal",
    "window": "window:KEYS[:sinks=KEYS][:symmetric]",
    "documents": "documents:LENGTH,LENGTH,...[:window=KEYS][:full]",
    "prefix": "prefix:TOKENS",
    "chunked": "chunked:TOKENS[:full]",
}


def parse_mask(text: str, n: int) -> Mask:
    """The mask that ``text`` describes, over ``n`` tokens. ValueError, with the nearest form, for anything unclear."""
    name, *parts = text.strip().split(":")
    if name not in FORMS:
        near = difflib.get_close_matches(name, FORMS, 1)
        hint = f"Did you mean {FORMS[near[0]]}?" if near else f"Write one of: {', '.join(FORMS.values())}."
        raise ValueError(f"The mask {text!r} has an unknown kind {name!r}. {hint}")
    sizes: list[int] = []
    if name not in ("full", "causal"):
        sizes = [_whole(text, name, value) for value in parts.pop(0).split(",")] if parts else []
        if not sizes or (name != "documents" and len(sizes) > 1):
            raise ValueError(f"The mask {text!r} needs {'sizes' if name == 'documents' else 'one size'}. Write {FORMS[name]}.")
    mask = _builders(n, sizes)[name](**_options(text, name, parts))
    if mask.n_tokens != n:
        raise ValueError(f"The mask {text!r} has {mask.n_tokens} tokens in all, but the sequence has {n}. Make them equal.")
    return mask


def _builders(n: int, sizes: list[int]) -> dict[str, Callable[..., Mask]]:
    return {
        "full": lambda: masks.full(n),
        "causal": lambda: masks.causal(n),
        "window": lambda **options: masks.sliding_window(n, sizes[0], **options),
        "documents": lambda full=False, **options: masks.documents(sizes, causal=not full, **options),
        "prefix": lambda: masks.prefix_lm(n, sizes[0]),
        "chunked": lambda full=False: masks.chunked(n, sizes[0], causal=not full),
    }


def _options(text: str, name: str, parts: list[str]) -> dict[str, int | bool]:
    """The options after the sizes: those that the form of ``name`` shows, a number where the form shows one."""
    allowed = {part.strip("[]").partition("=")[0]: "=" in part for part in FORMS[name].split("[:")[1:]}
    options: dict[str, int | bool] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if key not in allowed or allowed[key] != bool(equals) or key in options:
            near = difflib.get_close_matches(key, allowed, 1)
            hint = f"Did you mean {near[0]!r}? " if near and near[0] != key else ""
            raise ValueError(f"The mask {text!r} cannot take the option {part!r}. {hint}Write {FORMS[name]}.")
        options[key] = _whole(text, name, value) if equals else True
    return options


def _whole(text: str, name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"The mask {text!r} has {value!r} where a whole number belongs. Write {FORMS[name]}.") from None
