"""Token files with document boundaries, and packed sequences read from them.

A token file is a folder::

    tokens.bin      all documents one after another: uint8, uint16 or uint32, little endian
    documents.bin   int64 boundaries: document d is tokens[boundary[d] : boundary[d + 1]]
    meta.json       dtype, counts, vocabulary, tokenizer, checksums

A packed sequence is N tokens of documents one after another, in an order that the seed gives. What the end of a sequence
cuts off a document is a document of its own in another sequence. Every rank computes the same sequence from its number
alone and reads only the rows that it holds, so the position in the data is one integer.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shutil
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distattn.config import Config
from distattn.loss import IGNORED

FORMAT = 1
FILES = ("meta.json", "documents.bin", "tokens.bin")


def write_tokens(
    path: str | Path, documents: Iterable[np.ndarray], vocab_size: int, tokenizer: str, replace: bool = True
) -> dict[str, Any]:
    """Writes a token file; ``path`` appears only when it is whole. Returns the meta of what is there then.

    documents are integer arrays; empty ones are left out. Raises ValueError where there is not one token, or where a
    token is not in the vocabulary. A token file that is there is replaced, anything else is refused.

    Args:
        replace: False keeps a token file that somebody else has put there in the meantime: of two runs that prepare the same
            folder at once the faster one's is used by both.
    """
    path = Path(path)
    if path.exists() and not _only_tokens(path):
        raise ValueError(f"{path} is there and is not a token file: it would be lost. Name a new folder, or remove it yourself.")
    # The process number alone comes again: in a container it is often the same on every start and on every machine.
    partial = path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        meta = _write_folder(partial, documents, vocab_size, tokenizer)
        return meta if _put(partial, path, replace) else open_tokens(path, verify=False).meta
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(whole: Path, path: Path, replace: bool) -> bool:
    """Gives the folder its name; False where another one has it and stays."""
    old = whole.with_suffix(".old")
    while True:
        try:
            os.rename(whole, path)
            return True
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if not replace:
            return False
        shutil.rmtree(old, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):  # somebody else who replaces it has moved it away
            os.rename(path, old)
        shutil.rmtree(old, ignore_errors=True)


def _only_tokens(path: Path) -> bool:
    return path.is_dir() and {inside.name for inside in path.iterdir()} <= set(FILES)


def _write_folder(folder: Path, documents: Iterable[np.ndarray], vocab_size: int, tokenizer: str) -> dict[str, Any]:
    dtype = "uint8" if vocab_size <= 1 << 8 else "uint16" if vocab_size <= 1 << 16 else "uint32"
    boundaries, checksum = [0], 0
    with open(folder / "tokens.bin", "wb") as file:
        for number, document in enumerate(documents):
            if not len(document):
                continue
            if document.min() < 0 or document.max() >= vocab_size:
                raise ValueError(f"Document {number} holds token {document.max()}, but the vocabulary has {vocab_size}.")
            raw = document.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
            checksum = zlib.crc32(raw, checksum)
            file.write(raw)
            boundaries.append(boundaries[-1] + len(document))
        if boundaries[-1] == 0:
            raise ValueError("There is no token in any document: nothing was written. Name files with text in them.")
        _sync(file)
    raw = np.array(boundaries, "<i8").tobytes()
    with open(folder / "documents.bin", "wb") as file:
        file.write(raw)
        _sync(file)
    meta = {
        "format": FORMAT,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "tokens": boundaries[-1],
        "documents": len(boundaries) - 1,
        "tokens_crc32": checksum,
        "documents_crc32": zlib.crc32(raw),
    }
    with open(folder / "meta.json", "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)
        _sync(file)
    return meta


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


@dataclass(frozen=True)
class TokenFile:
    path: Path
    meta: dict[str, Any]
    tokens: np.ndarray
    """uint8, uint16 or uint32 [tokens], mapped from the file."""
    boundaries: np.ndarray
    """int64 [documents + 1]"""

    @property
    def unit(self) -> str:
        """What a token is called in messages."""
        return "byte" if self.meta["tokenizer"] == "byte" else "token"

    def check_vocabulary(self, size: int) -> None:
        """ValueError where a model of ``size`` tokens has no row for some of these."""
        if self.meta["vocab_size"] > size:
            raise ValueError(
                f"{self.path} was made with {self.meta['vocab_size']} tokens, but model.vocab_size={size}. "
                f"Use model.vocab_size={self.meta['vocab_size']} or more."
            )


def open_tokens(path: str | Path, verify: bool = True) -> TokenFile:
    """Opens a token file. Sizes and boundaries are always checked; ``verify`` reads all tokens for their checksum.

    Raises ValueError where the folder is missing, incomplete, truncated or altered.
    """
    path = Path(path)
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise ValueError(f"{path} is not a token file: {', '.join(missing)} missing. Make one with launch/prepare.py.")
    meta = _read_meta(path)
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    for name, expected in (("tokens.bin", meta["tokens"] * dtype.itemsize), ("documents.bin", 8 * (meta["documents"] + 1))):
        found = (path / name).stat().st_size
        if found != expected:
            raise ValueError(_damaged(path / name, f"{expected} bytes were written, {found} are there"))
    raw = (path / "documents.bin").read_bytes()
    if zlib.crc32(raw) != meta["documents_crc32"]:
        raise ValueError(_damaged(path / "documents.bin", "its checksum differs from the one in meta.json"))
    tokens = np.memmap(path / "tokens.bin", dtype, mode="r")
    if verify and _checksum(tokens) != meta["tokens_crc32"]:
        raise ValueError(_damaged(path / "tokens.bin", "its checksum differs from the one in meta.json"))
    return TokenFile(path, meta, tokens, np.frombuffer(raw, "<i8"))


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        wanted = ("format", "dtype", "vocab_size", "tokenizer", "tokens", "documents", "tokens_crc32", "documents_crc32")
        absent = [name for name in wanted if name not in meta]
    except (ValueError, TypeError) as error:
        raise ValueError(_damaged(path / "meta.json", f"it is not readable: {error}")) from None
    if absent:
        raise ValueError(_damaged(path / "meta.json", f"{', '.join(absent)} missing"))
    counts = ("vocab_size", "tokens", "documents", "tokens_crc32", "documents_crc32")
    wrong = [name for name in counts if type(meta[name]) is not int or meta[name] < 0]
    if wrong or meta["dtype"] not in ("uint8", "uint16", "uint32"):
        name = wrong[0] if wrong else "dtype"
        raise ValueError(_damaged(path / "meta.json", f"{name} is {meta[name]!r}"))
    if meta["format"] != FORMAT:
        raise ValueError(f"{path} has format {meta['format']}, this version reads format {FORMAT}. Prepare it again.")
    return meta


def _damaged(file: Path, why: str) -> str:
    return f"{file} is damaged: {why}. Remove {file.parent} and prepare it again."


def _checksum(tokens: np.ndarray, block: int = 1 << 24) -> int:
    checksum = 0
    for start in range(0, len(tokens), block):
        checksum = zlib.crc32(tokens[start : start + block].tobytes(), checksum)
    return checksum


def scatter(numbers: np.ndarray, seed: int) -> np.ndarray:
    """uint64 that look random, from integers and a seed (splitmix64): the same on every machine and numpy for ever."""
    with np.errstate(over="ignore"):
        x = numbers.astype(np.uint64) + np.uint64(seed * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15 & (1 << 64) - 1)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def split(documents: int, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the documents to train on and of those held out, each sorted. At least one is held out if any part is."""
    order = np.argsort(scatter(np.arange(documents), seed), kind="stable")
    count = 0 if held_out == 0 or documents < 2 else min(documents - 1, max(1, round(held_out * documents)))
    return np.sort(order[count:]), np.sort(order[:count])


class Rows(NamedTuple):
    """Some rows of a packed sequence, int64 [n] each."""

    tokens: Tensor
    labels: Tensor
    """the next token of the same document; -100 at a document's last and in padding"""
    positions: Tensor
    """within the document"""


@dataclass(frozen=True)
class Sequence:
    """One packed sequence; nothing of it is read before ``rows`` asks."""

    tokens: np.ndarray
    offsets: np.ndarray
    """int64 [documents]: where each document (or part of one) begins in ``tokens``"""
    lengths: np.ndarray
    """int64 [documents]: they add up to the length of the sequence"""

    @property
    def labels(self) -> int:
        """How many rows have a label: all but the last of each document."""
        return int((self.lengths - 1).sum())

    def rows(self, positions: np.ndarray) -> Rows:
        """The rows at these places of the sequence, in this order. Places past the end are padding."""
        positions = np.asarray(positions, np.int64)
        ends = np.cumsum(self.lengths)
        document = np.searchsorted(ends, positions, side="right")
        padding = document == len(ends)
        document = np.where(padding, 0, document)
        inside = positions - (ends - self.lengths)[document]
        last = inside + 1 == self.lengths[document]
        place = np.where(padding, 0, self.offsets[document] + inside)
        tokens = np.where(padding, 0, self.tokens[place].astype(np.int64))
        labels = np.where(padding | last, IGNORED, self.tokens[np.where(padding | last, 0, place + 1)].astype(np.int64))
        return Rows(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(np.where(padding, 0, inside)))


class Packer:
    """Sequence number i of an endless stream over ``documents`` of a token file; any i, in any order.

    An epoch puts the documents in an order of its own, cuts their tokens into sequences and shuffles these: neighbours
    in the stream come from different documents. The last one, if it is short, is filled from the beginning of the epoch.
    Documents of more than ``longest`` tokens (0: of any length) are cut into that many first, each part a document of its own.
    """

    def __init__(self, file: TokenFile, documents: np.ndarray, length: int, seed: int, longest: int = 0) -> None:
        if not len(documents):
            raise ValueError(f"{file.path} leaves no document to read. Add documents or change data.held_out.")
        self.file, self.documents, self.length, self.seed, self.longest = file, documents, length, seed, longest
        self.epoch_tokens = int((file.boundaries[documents + 1] - file.boundaries[documents]).sum())
        self.epoch_sequences = -(-self.epoch_tokens // length)
        self._cached: tuple[int, _Epoch] | None = None

    def identity(self) -> dict[str, int]:
        """What the numbering of sequences depends on. A checkpoint keeps it, resume compares it."""
        listed = zlib.crc32(np.ascontiguousarray(self.documents, "<i8").tobytes())
        meta = self.file.meta
        tokens = {"tokens_crc32": meta["tokens_crc32"], "documents_crc32": listed}
        return {**tokens, "length": self.length, "seed": self.seed, "longest": self.longest}

    def sequence(self, number: int) -> Sequence:
        """Sequence ``number`` of the stream."""
        epoch = self._epoch(number // self.epoch_sequences)
        begin, missing = int(epoch.shuffled[number % self.epoch_sequences]) * self.length, self.length
        offsets, lengths = [], []
        while missing:
            end = min(begin + missing, self.epoch_tokens)
            first = np.searchsorted(epoch.bounds, begin, side="right") - 1
            bounds = epoch.bounds[first : np.searchsorted(epoch.bounds, end, side="left") + 1]
            starts = np.maximum(bounds[:-1], begin)
            offsets.append(epoch.origins[first : first + len(starts)] + starts - bounds[:-1])
            lengths.append(np.minimum(bounds[1:], end) - starts)
            begin, missing = 0, missing - (end - begin)
        return Sequence(self.file.tokens, np.concatenate(offsets), np.concatenate(lengths))

    def _epoch(self, epoch: int) -> _Epoch:
        if self._cached is None or self._cached[0] != epoch:
            seed = self.seed + 1 + epoch  # seed itself chooses what is held out
            origins, sizes = self._parts()
            order = np.argsort(scatter(origins, seed), kind="stable")
            shuffled = np.argsort(scatter(np.arange(self.epoch_sequences), seed), kind="stable")
            bounds = np.concatenate(([0], np.cumsum(sizes[order])))
            self._cached = (epoch, _Epoch(origins[order], bounds, shuffled))
        return self._cached[1]

    def _parts(self) -> tuple[np.ndarray, np.ndarray]:
        """(where each begins in the file, tokens) of the documents, or of their parts where some are too long."""
        begin, end = self.file.boundaries[self.documents], self.file.boundaries[self.documents + 1]
        if not self.longest:
            return begin, end - begin
        parts = np.maximum(1, -(-(end - begin) // self.longest))
        document = np.repeat(np.arange(len(parts)), parts)
        number = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
        origin = begin[document] + number * self.longest
        return origin, np.minimum(self.longest, end[document] - origin)


class _Epoch(NamedTuple):
    origins: np.ndarray
    """where each document begins in the file, in the order of the epoch"""
    bounds: np.ndarray
    """the same in the epoch, and the end of the last"""
    shuffled: np.ndarray
    """the order of the sequences"""


def make_packers(config: Config) -> tuple[Packer, Packer | None]:
    """Sequences to train on, and held-out ones (None where nothing is held out)."""
    data = config.data
    file = open_tokens(data.path, verify=False)  # launch/train.py has verified it, once a machine
    file.check_vocabulary(config.model.vocab_size)
    training, held_out = split(file.meta["documents"], data.held_out, data.seed)
    options = (data.sequence_length, data.seed, data.longest_document)
    return Packer(file, training, *options), Packer(file, held_out, *options) if len(held_out) else None
