"""From text to documents of tokens: which files, and which tokenizer."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from distattn.data import write_tokens

STDLIB = "stdlib"
BYTE = "byte"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".html", ".tex", ".json")

Encode = Callable[[bytes], np.ndarray]
Progress = Callable[[int, int], None]
"""(documents done, documents in all)"""


def stdlib_files() -> list[Path]:
    """Python's own library in the interpreter that runs this, sorted: about 1,800 files and 31 MB."""
    root = Path(sysconfig.get_paths()["stdlib"])
    inside = (path for path in root.rglob("*.py") if not {"site-packages", "dist-packages"} & set(path.parts))
    return sorted(inside)


def find_files(sources: Sequence[str]) -> list[Path]:
    """The text files that these names mean: 'stdlib', a file, or a folder (its text files, sorted). One file, one document."""
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        if source == STDLIB and not path.exists():
            files += stdlib_files()
        elif path.is_file():
            files.append(path)
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in TEXT_SUFFIXES and p.is_file())
            if not found:
                raise ValueError(f"{path} has no text file ({' '.join(TEXT_SUFFIXES)}). Name the files themselves.")
            files += found
        else:
            raise ValueError(f"No file or folder {source}. Name text files, folders of them, or 'stdlib'.")
    return files


def load_tokenizer(name: str) -> tuple[int, Encode]:
    """(vocabulary size, bytes of text -> tokens) of 'byte' or a tokenizers JSON file."""
    if name == BYTE:
        return 256, lambda raw: np.frombuffer(raw, np.uint8)
    if not Path(name).is_file():
        raise ValueError(f"No tokenizer {name!r}. Use 'byte', or the path of a tokenizers JSON file (tokenizer.json).")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise ValueError("A tokenizer JSON needs the package tokenizers: pip install tokenizers, or use 'byte'.") from None
    try:
        tokenizer = Tokenizer.from_file(name)
    except Exception as error:  # the package raises plain Exception
        raise ValueError(f"{name} is not a tokenizers JSON file: {error}") from None
    return tokenizer.get_vocab_size(), lambda raw: np.array(tokenizer.encode(raw.decode("utf-8", "replace")).ids, np.int64)


def prepare(
    sources: Sequence[str], path: str | Path, tokenizer: str = BYTE, progress: Progress | None = None, replace: bool = True
) -> dict:
    """Writes the token file ``path`` from text files, one document each. Returns its meta; see :func:`write_tokens`."""
    files = find_files(sources)
    vocab_size, encode = load_tokenizer(tokenizer)
    return write_tokens(path, _encoded(files, encode, progress), vocab_size, tokenizer, replace)


def _encoded(files: Sequence[Path], encode: Encode, progress: Progress | None) -> Iterator[np.ndarray]:
    for done, file in enumerate(files, 1):
        try:
            raw = file.read_bytes()
        except OSError as error:
            raise ValueError(f"Cannot read {file}: {error}") from None
        yield encode(raw)
        if progress:
            progress(done, len(files))
