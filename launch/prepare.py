"""Makes a token file from text: prepare.py OUT SOURCE ... [--tokenizer FILE]

OUT is the new folder. A SOURCE is a text file, a folder of them, or 'stdlib': the source of Python's own library.
One file is one document. Tokens are bytes, or those of a tokenizers JSON file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distattn.corpus import BYTE, prepare


def main(arguments: list[str] | None = None) -> int:
    """0 is success, 2 a mistake in what was asked, which is printed."""
    parser = argparse.ArgumentParser("prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="the new folder")
    parser.add_argument("source", nargs="+", help="a text file, a folder, or 'stdlib'")
    parser.add_argument("--tokenizer", default=BYTE, help="'byte' (default) or a tokenizers JSON file")
    parser.add_argument("--replace", action="store_true", help="replace OUT if it is there")
    asked = parser.parse_args(arguments)
    try:
        if Path(asked.out).exists() and not asked.replace:
            raise ValueError(f"{asked.out} is there already. Name another folder, or add --replace.")
        meta = prepare(asked.source, asked.out, asked.tokenizer, show_progress)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{asked.out}: {meta['tokens']:,} tokens ({meta['dtype']}) in {meta['documents']:,} documents, "
        f"vocabulary {meta['vocab_size']:,}. Train with data.path={asked.out} model.vocab_size={meta['vocab_size']}"
    )
    return 0


def show_progress(done: int, documents: int) -> None:
    """Prints how far preparation is, on one line of a terminal, at most 20 times."""
    if done == documents or done % max(1, documents // 20) == 0:
        on_terminal = sys.stdout.isatty()
        print(f"\rprepared {done:,} of {documents:,} documents", end="" if on_terminal and done < documents else "\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
