"""PTX text as data: the parameters, registers and instructions of one entry.

Reads what triton's compiler writes and no more. Names of an inner scope (the waiting loop of an mbarrier has a predicate and a
label of its own) become names of their own. Whatever is not understood is an error, never skipped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Union

WIDTHS = {"pred": "p", "b16": "h", "b32": "r", "b64": "d"}  # of a register declaration: the letter of its file
PREFIXES = {"%p": "p", "%rs": "h", "%r": "r", "%rd": "d"}
BITS = {"p": 1, "h": 16, "r": 32, "d": 64}
PARAMETER_BYTES = {"u32": 4, "f32": 4, "u64": 8}
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%nctaid.x", "%nctaid.y")


class PtxError(ValueError):
    """The text holds something that the emulator does not know."""


@dataclass(frozen=True)
class Register:
    """``file`` is p (predicates), h (16 bits), r (32) or d (64)."""

    file: str
    index: int


@dataclass(frozen=True)
class Immediate:
    """Bits of a literal: an integer as it is written, a float32 as its bits."""

    value: int
    is_float: bool = False


@dataclass(frozen=True)
class Symbol:
    """A name with an address or a value of its own: a parameter, shared memory, %tid.x, a label, ``_``."""

    name: str


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """Two results, ``a|b``."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int = 0
    coordinates: Vector | None = None


Operand = Union[Register, Immediate, Symbol, Vector, Pair, Address]  # noqa: UP007  the names are strings until here


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    line: int

    def __str__(self) -> str:
        return f"{self.opcode} (line {self.line})"


@dataclass(frozen=True)
class Parameter:
    """``type`` is u32, f32, u64, or map for the 128 bytes of a tensor map."""

    name: str
    type: str


@dataclass
class Entry:
    """One kernel. ``labels`` gives the instruction that follows, ``tables`` the labels of a brx.idx."""

    name: str
    parameters: list[Parameter]
    threads: int
    registers_a_thread: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(BITS, 0))


def parse(text: str) -> Entry:
    """The only entry of a module; PtxError where it holds what is not known."""
    text = re.sub(r"//[^\n]*|^\s*\.loc\b[^\n]*", "", text, flags=re.M)
    for wanted in (".target sm_90a", ".address_size 64"):
        if wanted not in text:
            raise PtxError(f"no {wanted!r} in the module")
    heads = list(re.finditer(r"\.visible \.entry (\w+)\((.*?)\)\s*\.reqntid (\d+)\s*(?:\.maxnreg (\d+)\s*)?\{", text, re.S))
    if len(heads) != 1 or text.count(".entry") != 1:
        raise PtxError(f"{text.count('.entry')} entries, expected one with .reqntid")
    head = heads[0]
    entry = Entry(head[1], [_parameter(x) for x in head[2].split(",")], int(head[3]), int(head[4] or 255))
    _Body(entry).read(text, head.end())
    return entry


def _parameter(text: str) -> Parameter:
    found = re.fullmatch(r"\s*\.param (\.align 64 \.b8|\.[a-z]\d+(?: \.ptr \.global \.align 1)?) (\w+)(\[128\])?\s*", text)
    if found is None or (found[3] is not None) != found[1].startswith(".align"):
        raise PtxError(f"parameter {text.strip()!r}")
    kind = "map" if found[3] else found[1].split()[0][1:]
    if kind not in (*PARAMETER_BYTES, "map"):
        raise PtxError(f"parameter {text.strip()!r}")
    return Parameter(found[2], kind)


class _Body:
    """Reads statements; ``scopes`` are the names of the braces that are open, innermost last."""

    def __init__(self, entry: Entry):
        self.entry = entry
        self.scopes: list[dict[str, Operand]] = [{}]
        self.numbers = [0]  # of the scopes
        self.n_scopes = 0

    def read(self, text: str, at: int) -> None:
        line = text.count("\n", 0, at) + 1
        for statement in _statements(text, at):
            number = line + statement.count("\n", 0, len(statement) - len(statement.lstrip()))
            line += statement.count("\n")
            word = statement.strip()
            if word == "{":
                self.n_scopes += 1
                self.scopes.append({})
                self.numbers.append(self.n_scopes)
            elif word == "}":
                self.scopes.pop()
                self.numbers.pop()
                if not self.scopes:
                    return
            elif word.endswith(":"):
                self._label(word[:-1])
            elif word.startswith(".reg"):
                self._declare(word)
            elif word.startswith(".branchtargets"):
                name = list(self.entry.labels)[-1]
                self.entry.tables[name] = [label.strip() for label in word.rstrip(";").removeprefix(".branchtargets").split(",")]
            elif word:
                self.entry.instructions.append(self._instruction(word.rstrip(";"), number))
        raise PtxError(f"the body of {self.entry.name} does not end")

    def _label(self, name: str) -> None:
        name = self._local(name)
        if name in self.entry.labels:
            raise PtxError(f"label {name} stands twice")
        self.entry.labels[name] = len(self.entry.instructions)

    def _local(self, label: str) -> str:
        """Labels of an inner scope are its own; those that begin with $ are the compiler's."""
        return label if len(self.scopes) == 1 or label.startswith("$") else f"{label}@{self.numbers[-1]}"

    def _declare(self, word: str) -> None:
        found = re.fullmatch(r"\.reg \.(\w+)\s+(%?\w+)(?:<(\d+)>)?;", word)
        if found is None or found[1] not in WIDTHS:
            raise PtxError(word)
        file, name, count = WIDTHS[found[1]], found[2], found[3]
        if count is None:
            self.scopes[-1][name] = Register(file, self.entry.counts[file])
            self.entry.counts[file] += 1
        elif PREFIXES.get(name) != file:
            raise PtxError(word)
        else:
            self.entry.counts[file] = int(count)

    def _instruction(self, text: str, line: int) -> Instruction:
        found = re.fullmatch(r"(?:@(!?)(%?\w+)\s+)?([a-z_][\w.:]*)\s*(.*)", text, re.S)
        if found is None:
            raise PtxError(f"line {line}: {text!r}")
        guard = None
        if found[2]:
            register = self._operand(found[2])
            if not isinstance(register, Register) or register.file != "p":
                raise PtxError(f"line {line}: guard {found[2]}")
            guard = register
        operands = tuple(self._operand(x) for x in _split(found[4]))
        if found[3] in ("bra", "bra.uni") and len(operands) == 1 and isinstance(operands[0], Symbol):
            operands = (Symbol(self._local(operands[0].name)),)
        return Instruction(found[3], operands, guard, found[1] == "!", line)

    def _operand(self, text: str) -> Operand:
        text = text.strip()
        for scope in reversed(self.scopes):
            if text in scope:
                return scope[text]
        if text.startswith("{"):
            return Vector(tuple(self._operand(x) for x in _split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1])
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first), self._operand(second))
        if found := re.fullmatch(r"(%(?:p|rs|rd|r))(\d+)", text):
            register = Register(PREFIXES[found[1]], int(found[2]))
            if register.index >= self.entry.counts[register.file]:
                raise PtxError(f"{text} is not declared")
            return register
        if found := re.fullmatch(r"0f([0-9A-Fa-f]{8})", text):
            return Immediate(int(found[1], 16), True)
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
            return Immediate(int(text, 0))
        if text in SPECIAL or re.fullmatch(r"[\w$]+", text):
            return Symbol(text)
        raise PtxError(f"operand {text!r}")

    def _address(self, text: str) -> Address:
        parts = _split(text)
        found = re.fullmatch(r"\s*([%\w]+)\s*(?:\+\s*(\d+)\s*)?", parts[0])
        if found is None or len(parts) > 2:
            raise PtxError(f"address [{text}]")
        coordinates = self._operand(parts[1]) if len(parts) == 2 else None
        if coordinates is not None and not isinstance(coordinates, Vector):
            raise PtxError(f"address [{text}]")
        return Address(self._operand(found[1]), int(found[2] or 0), coordinates)


def _statements(text: str, at: int) -> Iterator[str]:
    """Statements from ``at`` on: ``...;``, ``label:``, and braces that stand where a statement begins."""
    pattern = re.compile(r"\s*(?:[{}]|[\w$]+:(?!:)|[^;]*;)", re.S)
    while at < len(text):
        found = pattern.match(text, at)
        if found is None:
            return
        at = found.end()
        yield found[0]


def _split(text: str) -> list[str]:
    """At commas outside of braces and brackets."""
    parts, depth, begin = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(text[begin:at])
            begin = at + 1
    return [*parts, text[begin:]] if text.strip() else []
