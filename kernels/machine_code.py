"""Loops of a compiled kernel, read from its machine code: instructions, basic blocks, and the ways through a loop.

nvdisasm and cuobjdump come with triton. A way through a loop leaves out what is tried again while a barrier is not ready, so
it is what a warp issues for one tile when nothing has to be waited for.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path


@dataclass(frozen=True)
class Instruction:
    """One of 16 bytes at address ``at``; ``text`` as the disassembler writes it, predicate first."""

    at: int
    text: str

    @property
    def predicate(self) -> str:
        return self.text.split()[0] if self.text.startswith("@") else ""

    @property
    def body(self) -> str:
        """Without the predicate."""
        return self.text[len(self.predicate) :].strip()

    @property
    def name(self) -> str:
        """With its modifiers, as in ``FSETP.GEU.AND``."""
        return self.body.split()[0]

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"0x([0-9a-f]+)$", self.body) if self.name.split(".")[0] == "BRA" else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        ends = self.name.split(".")[0] in ("BRA", "BRX", "EXIT", "RET")
        return not ends or bool(self.predicate) or "," in self.body  # BRA.DIV and the like name their condition


Way = tuple[Instruction, ...]


def tools() -> Path:
    """Where triton keeps the assembler and its kin."""
    import triton  # what is read need not come from here

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def disassemble(cubin: bytes) -> tuple[Instruction, ...]:
    """All instructions of a binary with one kernel."""
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernel.cubin"
        code.write_bytes(cubin)
        done = subprocess.run([tools() / "cuobjdump", "-sass", code], capture_output=True, text=True, check=True)
    return parse(done.stdout)


def parse(text: str) -> tuple[Instruction, ...]:
    """The instructions in what a disassembler wrote."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", text)
    return tuple(Instruction(int(at, 16), words.strip()) for at, words in lines)


@dataclass(frozen=True)
class Loop:
    """A natural loop: blocks by the address where they begin. ``latches`` go back to ``header``."""

    header: int
    latches: frozenset[int]
    blocks: frozenset[int]


class Flow:
    """Basic blocks of a kernel and how control passes between them."""

    def __init__(self, code: Iterable[Instruction]):
        self.code = tuple(code)
        follows = {a.at: b.at for a, b in zip(self.code, self.code[1:], strict=False)}
        starts = {self.code[0].at} | {i.target for i in self.code if i.target is not None}
        starts |= {follows[i.at] for i in self.code if i.at in follows and (i.target is not None or not i.falls_through)}
        self.blocks: dict[int, Way] = {}
        for instruction in self.code:
            if instruction.at in starts:
                start = instruction.at
                self.blocks[start] = ()
            self.blocks[start] += (instruction,)
        self.next = {start: self._successors(block[-1], follows) for start, block in self.blocks.items()}

    def _successors(self, last: Instruction, follows: dict[int, int]) -> tuple[int, ...]:
        places = [last.target] if last.target is not None else []
        places += [follows[last.at]] if last.falls_through and last.at in follows else []
        return tuple(dict.fromkeys(place for place in places if place in self.blocks))

    @cached_property
    def before(self) -> dict[int, list[int]]:
        """Predecessors."""
        found: dict[int, list[int]] = {start: [] for start in self.blocks}
        for start, places in self.next.items():
            for place in places:
                found[place].append(start)
        return found

    @cached_property
    def starts(self) -> set[int]:
        """The first block, and each that nothing reaches as far as the text tells: what stands behind a jump table."""
        found, seen = set(), set()
        for start in self.blocks:
            if start not in seen:
                found.add(start)
                todo = [start]
                while todo:
                    block = todo.pop()
                    if block not in seen:
                        seen.add(block)
                        todo += self.next[block]
        return found

    @cached_property
    def dominators(self) -> dict[int, set[int]]:
        """For each block those that control must have passed when it comes there."""
        every, changed = set(self.blocks), True
        found = {block: {block} if block in self.starts else set(every) for block in self.blocks}
        while changed:
            changed = False
            for block in every - self.starts:
                now = {block} | set.intersection(*(found[place] for place in self.before[block]))
                changed |= now != found[block]
                found[block] = now
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        """Natural loops, in order of address. A barrier's second tries are loops of one block."""
        latches: dict[int, set[int]] = {}
        for start, places in self.next.items():
            for place in places:
                if place in self.dominators[start]:
                    latches.setdefault(place, set()).add(start)
        return [Loop(header, frozenset(ends), self._body(header, ends)) for header, ends in sorted(latches.items())]

    def _body(self, header: int, latches: set[int]) -> frozenset[int]:
        body, todo = {header}, list(latches)
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += self.before[block]
        return frozenset(body)

    def innermost(self, name: str) -> list[Loop]:
        """Loops with an instruction whose name begins like ``name``, none of them around another such loop."""
        holds = [x for x in self.loops if any(i.name.startswith(name) for block in x.blocks for i in self.blocks[block])]
        return [x for x in holds if not any(y.header != x.header and y.blocks < x.blocks for y in holds)]

    def ways(self, loop: Loop) -> tuple[Way, Way]:
        """(shortest, longest) way once through the loop by number of instructions: without and with what is optional."""
        own = {x.header for x in self.loops if x.blocks == {x.header} and x.header != loop.header}
        inside = {b: [n for n in self.next[b] if n in loop.blocks - own and n not in self.dominators[b]] for b in loop.blocks}

        @cache
        def from_block(block: int, longest: bool) -> tuple[int, ...] | None:
            rest: list[tuple[int, ...]] = [way for n in inside[block] if (way := from_block(n, longest)) is not None]
            if block in loop.latches:
                rest.append(())
            lengths = [(sum(len(self.blocks[b]) for b in way), way) for way in rest]
            return (block, *(max if longest else min)(lengths)[1]) if lengths else None

        short, long = from_block(loop.header, False), from_block(loop.header, True)
        assert short is not None and long is not None, loop
        return (
            tuple(i for block in short for i in self.blocks[block]),
            tuple(i for block in long for i in self.blocks[block]),
        )
