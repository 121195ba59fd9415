"""What each PTX instruction between two registers does, as a line of numpy over the lanes of a slice of threads.

A register is a row with a number a thread; the same bits are seen as U (uint32), I (int32), F (float32), Q (uint64), S (int64),
H (uint16) or P (a predicate). An instruction has a type for the result and one for each operand, and a line in which {0} is
the result. ``n`` is a literal that becomes part of the line. Arithmetic is the PTX ISA's: integers wrap, fma rounds once,
ftz flushes; ``approx`` and ``full`` are as exact as numpy, so a chip may differ by 2 units in the last place.
"""

from __future__ import annotations

import numpy as np

from tests.kernels.ptx_parse import Immediate, Instruction, Operand, PtxError, Register

FILES = {"U": "r", "I": "r", "F": "r", "Q": "d", "S": "d", "H": "h", "P": "p"}
TYPES = {"U": np.uint32, "I": np.int32, "F": np.float32, "Q": np.uint64, "S": np.int64, "H": np.uint16, "P": np.bool_}
TINY = np.float32(2.0**-126)  # the smallest normal number: ftz flushes what is smaller

_COMPARE = {"lt": "less", "le": "less_equal", "gt": "greater", "ge": "greater_equal", "eq": "equal", "ne": "not_equal"}
_SETP_TYPES = {"s32": "I", "u32": "U", "b32": "U", "s64": "S", "u64": "Q", "b64": "Q", "b16": "H", "u16": "H", "f32": "F"}

ALU: dict[str, tuple[str, str]] = {
    "mov.b32": ("UU", "np.copyto({0}, {1})"),
    "mov.u32": ("UU", "np.copyto({0}, {1})"),
    "mov.b64": ("QQ", "np.copyto({0}, {1})"),
    "mov.pred": ("PP", "np.copyto({0}, {1})"),
    "cvta.param.u64": ("QQ", "np.copyto({0}, {1})"),
    "add.s32": ("UUU", "np.add({1}, {2}, {0})"),
    "sub.s32": ("UUU", "np.subtract({1}, {2}, {0})"),
    "mul.lo.s32": ("UUU", "np.multiply({1}, {2}, {0})"),
    "mad.lo.s32": ("UUUU", "np.add(np.multiply({1}, {2}), {3}, {0})"),
    "mul.hi.s32": ("III", "np.copyto({0}, np.multiply({1}, {2}, dtype=i8) >> 32, casting='unsafe')"),
    "div.s32": ("III", "divide({1}, {2}, {0}, m)"),
    "rem.s32": ("III", "remainder({1}, {2}, {0}, m)"),
    "min.s32": ("III", "np.minimum({1}, {2}, out={0})"),
    "max.s32": ("III", "np.maximum({1}, {2}, out={0})"),
    "min.u32": ("UUU", "np.minimum({1}, {2}, out={0})"),
    "max.u32": ("UUU", "np.maximum({1}, {2}, out={0})"),
    "neg.s32": ("II", "np.negative({1}, {0})"),
    "not.b32": ("UU", "np.invert({1}, {0})"),
    "and.b32": ("UUU", "np.bitwise_and({1}, {2}, {0})"),
    "or.b32": ("UUU", "np.bitwise_or({1}, {2}, {0})"),
    "xor.b32": ("UUU", "np.bitwise_xor({1}, {2}, {0})"),
    "and.b16": ("HHH", "np.bitwise_and({1}, {2}, {0})"),
    "shl.b32": ("UUn", "np.left_shift({1}, shift32({2}), {0})"),
    "shr.u32": ("UUn", "np.right_shift({1}, shift32({2}), {0})"),
    "shr.s32": ("IIn", "np.right_shift({1}, shift32({2}), {0})"),
    "bfe.u32": ("UUnn", "np.bitwise_and(np.right_shift({1}, shift32({2})), field({2}, {3}), {0})"),
    "add.s64": ("QQQ", "np.add({1}, {2}, {0})"),
    "mul.lo.s64": ("QQQ", "np.multiply({1}, {2}, {0})"),
    "mad.lo.s64": ("QQQQ", "np.add(np.multiply({1}, {2}), {3}, {0})"),
    "or.b64": ("QQQ", "np.bitwise_or({1}, {2}, {0})"),
    "and.b64": ("QQQ", "np.bitwise_and({1}, {2}, {0})"),
    "shl.b64": ("QQn", "np.left_shift({1}, shift64({2}), {0})"),
    "shr.s64": ("SSn", "np.right_shift({1}, shift64({2}), {0})"),
    "shr.u64": ("QQn", "np.right_shift({1}, shift64({2}), {0})"),
    "mul.wide.s32": ("SII", "np.multiply({1}, {2}, {0}, dtype=i8)"),
    "mul.wide.u32": ("QUU", "np.multiply({1}, {2}, {0}, dtype=u8)"),
    "mul.wide.u16": ("UHH", "np.multiply({1}, {2}, {0}, dtype=u4)"),
    "mad.wide.s32": ("SIIS", "np.add(np.multiply({1}, {2}, dtype=i8), {3}, {0})"),
    "mad.wide.u32": ("QUUQ", "np.add(np.multiply({1}, {2}, dtype=u8), {3}, {0})"),
    "and.pred": ("PPP", "np.logical_and({1}, {2}, {0})"),
    "or.pred": ("PPP", "np.logical_or({1}, {2}, {0})"),
    "not.pred": ("PP", "np.logical_not({1}, {0})"),
    "selp.b32": ("UUUP", "np.copyto({0}, np.where({3}, {1}, {2}))"),
    "selp.f32": ("UUUP", "np.copyto({0}, np.where({3}, {1}, {2}))"),
    "selp.b16": ("HHHP", "np.copyto({0}, np.where({3}, {1}, {2}))"),
    "add.f32": ("FFF", "np.add({1}, {2}, {0})"),
    "sub.f32": ("FFF", "np.subtract({1}, {2}, {0})"),
    "mul.f32": ("FFF", "np.multiply({1}, {2}, {0})"),
    "neg.f32": ("FF", "np.negative({1}, {0})"),
    "max.f32": ("FFF", "np.fmax({1}, {2}, {0})"),
    "min.f32": ("FFF", "np.fmin({1}, {2}, {0})"),
    "div.full.f32": ("FFF", "np.divide({1}, {2}, {0})"),
    "fma.rn.f32": ("FFFF", "np.copyto({0}, np.multiply({1}, {2}, dtype=f8) + {3}, casting='same_kind')"),
    "fma.rn.ftz.f32": ("FFFF", "np.copyto({0}, np.multiply({1}, {2}, dtype=f8) + {3}, casting='same_kind')\nflush({0})"),
    "ex2.approx.ftz.f32": ("FF", "np.exp2({1}, {0})\nflush({0})"),
    "cvt.s64.s32": ("SI", "np.copyto({0}, {1})"),
    "cvt.u64.u32": ("QU", "np.copyto({0}, {1})"),
    "cvt.u64.u16": ("QH", "np.copyto({0}, {1})"),
    "cvt.u32.u16": ("UH", "np.copyto({0}, {1})"),
    "shl.b16": ("HHn", "np.copyto({0}, ({1}.astype(u4) << shift32({2})).astype(np.uint16))"),
    "cvt.u32.u64": ("UQ", "np.copyto({0}, {1}, casting='unsafe')"),
    "cvt.u16.u32": ("HU", "np.copyto({0}, {1}, casting='unsafe')"),
    "cvt.rn.f32.s32": ("FI", "np.copyto({0}, {1}, casting='same_kind')"),
    "cvt.rn.bf16.f32": ("HU", "np.copyto({0}, to_bf16({1}), casting='unsafe')"),
    "cvt.rn.f16.f32": ("HF", "np.copyto({0}, to_f16({1}))"),
    "cvt.rn.bf16x2.f32": ("UUU", "np.copyto({0}, to_bf16({1}) << 16 | to_bf16({2}))"),
    "cvt.rn.f16x2.f32": ("UFF", "np.copyto({0}, to_f16({1}).astype(u4) << 16 | to_f16({2}))"),
    "pack.b16": ("UHH", "np.copyto({0}, {1} | ({2}.astype(u4) << 16))"),
}  # fmt: skip


def _comparisons() -> None:
    for name, function in _COMPARE.items():
        for kind, letter in _SETP_TYPES.items():
            line = f"np.{function}({{1}}, {{2}}, {{0}})"
            if name == "ne" and kind == "f32":  # ordered: false where one of them is no number
                line = "np.not_equal({1}, {2}, {0})\nnp.logical_and({0}, {1} == {1}, {0})\nnp.logical_and({0}, {2} == {2}, {0})"
            ALU[f"setp.{name}.{kind}"] = (f"P{letter}{letter}", line)


_comparisons()


def divide(a: np.ndarray, b: np.ndarray, out: np.ndarray, mask: np.ndarray | None) -> None:
    """Towards zero."""
    wide, by = a.astype(np.int64), _divisor(b, mask)
    np.copyto(out, np.sign(wide) * np.sign(by) * (np.abs(wide) // np.abs(by)), casting="unsafe")


def remainder(a: np.ndarray, b: np.ndarray, out: np.ndarray, mask: np.ndarray | None) -> None:
    """With the sign of ``a``."""
    wide = a.astype(np.int64)
    np.copyto(out, np.sign(wide) * (np.abs(wide) % np.abs(_divisor(b, mask))), casting="unsafe")


def _divisor(b: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    zero = b == 0 if mask is None else (b == 0) & mask
    if zero.any():
        raise PtxError("an integer is divided by 0")
    return np.where(b == 0, 1, b).astype(np.int64)


def flush(x: np.ndarray) -> None:
    np.copyto(x, np.float32(0), where=np.abs(x) < TINY)


def to_bf16(bits: np.ndarray) -> np.ndarray:
    """To nearest even, in the low half of 32 bits; the NaN of PTX is 0x7fff."""
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, np.uint32(0x7FFF), rounded)


def to_f16(x: np.ndarray) -> np.ndarray:
    return np.asarray(x).astype(np.float16).view(np.uint16)


def field(begin: int, length: int) -> np.uint32:
    if not (begin >= 0 and length > 0 and begin + length <= 32):
        raise PtxError(f"bfe of {length} bits from {begin}")
    return np.uint32((1 << length) - 1)


class Lines:
    """Instructions to lines of Python; ``constants`` are the names that the lines need."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.constants: dict[str, object] = {
            "np": np, "i8": np.int64, "u8": np.uint64, "u4": np.uint32, "f8": np.float64, "divide": divide,
            "remainder": remainder, "flush": flush, "to_bf16": to_bf16, "to_f16": to_f16,
        }  # fmt: skip

    def row(self, operand: Operand, letter: str) -> str:
        """The expression of an operand that is read or written as ``letter``."""
        if isinstance(operand, Register):
            if operand.file != FILES[letter]:
                raise PtxError(f"a register of {operand.file} used as {letter}")
            return f"{letter}[{operand.index}]"
        if not isinstance(operand, Immediate):
            raise PtxError(f"{operand} where a value is expected")
        if operand.is_float != (letter == "F") and letter != "U":
            raise PtxError(f"a literal {'float32' if operand.is_float else 'integer'} used as {letter}")
        return self.constant(operand.value, letter)

    def constant(self, value: int, letter: str) -> str:
        name = f"{letter}_{value}".replace("-", "m")
        kind = TYPES[letter]
        if letter == "P":
            self.constants[name] = np.bool_(value != 0)
        else:
            bits = np.dtype(kind).itemsize * 8
            if not -(1 << (bits - 1)) <= value < 1 << bits:
                raise PtxError(f"{value} does not fit into {bits} bits")
            unsigned = np.array(value % (1 << bits), dtype=f"u{bits // 8}")
            self.constants[name] = unsigned.view(kind)[()]
        return name

    def alu(self, instruction: Instruction) -> None:
        types, body = ALU[instruction.opcode]
        if len(instruction.operands) != len(types) or instruction.guard is not None:
            raise PtxError(f"{instruction}: {len(instruction.operands)} operands, expected {len(types)} and no guard")
        if not isinstance(instruction.operands[0], Register):
            raise PtxError(f"{instruction} has no register for its result")
        rows = []
        for operand, letter in zip(instruction.operands, types, strict=True):
            rows.append(self._literal(operand) if letter == "n" else self.row(operand, letter))
        for n, letter in enumerate(types):
            if letter == "n":
                self._shift(body, n, int(rows[n]))
        self.lines += self._written(body, rows)

    def _literal(self, operand: Operand) -> str:
        if not isinstance(operand, Immediate) or operand.is_float:
            raise PtxError(f"{operand} where a literal is expected")
        return str(operand.value)

    def _shift(self, body: str, place: int, value: int) -> None:
        limit = 64 if "shift64" in body else 32
        if not 0 <= value < limit and place == 2:
            raise PtxError(f"a shift by {value}")

    def _written(self, body: str, rows: list[str]) -> list[str]:
        """With the counts of shifts and the masks of fields as constants of the type that keeps numpy from widening."""
        if "field(" in body:
            width = f"field_{rows[2]}_{rows[3]}"
            self.constants[width] = field(int(rows[2]), int(rows[3]))
            body = body.replace("field({2}, {3})", width)
        for call, letter in (("shift32({2})", "I" if rows[0][0] == "I" else "U"), ("shift64({2})", rows[0][0])):
            if call in body:
                body = body.replace(call, self.constant(int(rows[2]), letter))
        return body.format(*rows).split("\n")
