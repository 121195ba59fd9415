"""What a tile costs each unit of a Hopper multiprocessor, by the instructions of a kernel's loops: bounds, not predictions.

A bound is the time one unit is busy for one tile if it never waits; the largest of them is what the kernel cannot beat.
Rates per cycle of a multiprocessor of compute capability 9.0, from NVIDIA's tables of throughput: 4096 operations of tensor
cores in 16 bits, 128 of float32, 64 of integers, compares and conversions to 16 bits, 16 exponentials, 32 lanes of shuffles,
128 bytes of shared memory, 4 instructions, one of each quarter. wgmma reads what it is given in shared memory at the same 128
bytes: with 64 x n x 16 that binds below n = 64 when both operands lie there, as measured in arXiv:2402.13499.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from distattn.kernels.machine_code import Flow, Instruction, Way

CLOCK = 1.755  # GHz: an H100's or H200's under long load is 1.6 to 1.9
PROCESSORS = 132
BYTES = 128  # of shared memory a cycle

# (how name and operands begin, kind, unit of a quarter, cycles that a warp holds it): the first that fits.
RULES: tuple[tuple[str, str, str, int], ...] = (
    (r"HGMMA", "products", "", 0),
    (r"MUFU", "exponentials", "special", 8),
    (r"F2F\b|[FI]2[IF]\b", "conversions", "special", 8),
    (r"F2FP|I2FP|F2IP", "conversions", "integer", 2),
    (r"FMNMX", "maxima", "integer", 2),
    (r"FSEL|FSETP|FSET", "selections", "integer", 2),
    (r"FFMA|FMUL|FADD|HFMA2|HADD2|HMUL2", "float32", "float32", 1),
    (r"IMAD\.MOV|IMAD\.U32 \w+, RZ, RZ", "moves", "float32", 2),
    (r"MOV|CS2R|R2UR|S2UR|S2R|P2R|R2P", "moves", "integer", 2),
    (r"IMAD", "integers", "float32", 2),
    (r"LDSM|LDS|STSM|STS", "shared", "", 0),
    (r"LDG|LD\b|LDC|ULDC", "loads", "", 0),
    (r"STG|ST\b", "stores", "", 0),
    (r"LDL|STL", "spills", "", 0),
    (r"RED|ATOM", "adds", "", 0),
    (r"SHFL", "shuffles", "", 0),
    (r"UTMA|UBLKCP", "copies", "", 0),
    (r"SYNCS|BAR|WARPGROUP|WARPSYNC|DEPBAR|MEMBAR|FENCE|ERRBAR|CCTL|NANOSLEEP", "waits", "", 0),
    (r"BRA|BRX|EXIT|NOP|BSSY|BSYNC|CALL|RET|YIELD", "control", "", 0),
    (r"U[A-Z]", "uniform", "uniform", 2),
    (r"", "integers", "integer", 2),
)
PATTERNS = tuple((re.compile(f"(?:{pattern})"), kind, unit, cycles) for pattern, kind, unit, cycles in RULES)
QUARTER = ("special", "float32", "integer", "uniform")  # units of which each quarter of a multiprocessor has its own


def classify(instruction: Instruction) -> tuple[str, str, int]:
    """(kind, unit, cycles) by the first rule that fits."""
    return next(found[1:] for found in PATTERNS if found[0].match(instruction.body))


def product_cost(instruction: Instruction) -> tuple[float, int]:
    """(cycles of the tensor cores, bytes of shared memory) of one wgmma of a warpgroup.

    Raises:
        ValueError: no product of 16-bit numbers.
    """
    found = re.match(r"HGMMA\.(\d+)x(\d+)x16\S* \w+, (\w+)", instruction.body)
    if found is None:
        raise ValueError(f"Expected a product like HGMMA.64x128x16 of 16-bit numbers, found {instruction.text!r}.")
    m, n = int(found[1]), int(found[2])
    return m * n * 16 * 2 / 4096, 32 * (n + (m if found[3] == "gdesc" else 0))


def shared_bytes(instruction: Instruction) -> int:
    """Of shared memory that a warp takes up; a load may find all lanes at one place, which takes one turn of 128 bytes."""
    matrices = re.search(r"88\.(\d)", instruction.name)
    if matrices:
        return 128 * int(matrices[1])
    width = re.search(r"\.(64|128)\b", instruction.name)
    return BYTES if instruction.name.startswith("LD") or not width else 4 * int(width[1])


@dataclass(frozen=True)
class Turn:
    """What one warp issues for one tile. ``units`` in cycles of a quarter; ``order`` what stands between products and waits."""

    counts: dict[str, int]
    units: dict[str, int]
    instructions: int
    tensor: float
    operand_bytes: int
    shared_bytes: int
    added_bytes: int
    order: str

    @staticmethod
    def of(way: Way) -> Turn:
        kinds, units = Counter[str](), Counter[str]()
        for instruction in way:
            kind, unit, cycles = classify(instruction)
            kinds[kind] += 1
            units[unit] += cycles
        products = [product_cost(i) for i in way if classify(i)[0] == "products"]
        adds = [i for i in way if classify(i)[0] == "adds"]
        return Turn(
            dict(kinds.most_common()),
            {unit: units[unit] for unit in QUARTER},
            len(way),
            sum(cycles for cycles, _ in products),
            sum(size for _, size in products),
            sum(shared_bytes(i) for i in way if classify(i)[0] == "shared"),
            sum(32 * 4 * int(width[1]) if (width := re.search(r"F32x(\d)", i.name)) else 128 for i in adds),
            order(way),
        )


def order(way: Way) -> str:
    """Products and waits for them as they come, with the work between: where the assembler put a wait decides what overlaps."""
    parts: list[str] = []
    between: Counter[str] = Counter()

    def close() -> None:
        if between:
            parts.append(" ".join(f"{count} {kind}" for kind, count in between.items()))
            between.clear()

    run = 0
    for instruction in way:
        kind = classify(instruction)[0]
        wait = re.match(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", instruction.body)
        if kind == "products":
            if not run:
                close()
            run += 1
        elif wait or kind in ("maxima", "exponentials", "selections", "float32", "conversions", "shuffles", "adds", "shared"):
            if run and kind not in ("shared", "conversions"):  # loads and packing between products do not end a run of them
                parts.append(f"{run} products")
                run = 0
            if wait:
                close()
                parts.append(f"wait {wait[1]}")
            else:
                between[kind] += 1
    close()
    return " | ".join(parts + [f"{run} products"] * bool(run))


@dataclass(frozen=True)
class Tile:
    """What one pass of all consumers through their loops works on.

    ``area`` counts pairs of a query and a key, ``flops`` are the usual count of a pair and ``fetched`` bytes that copies bring.
    """

    area: int
    flops: int
    fetched: int


@dataclass(frozen=True)
class Cost:
    """The loops of one launch: each consumer's without and with the mask, and the producer's."""

    tile: Tile
    full: tuple[Turn, ...]
    masked: tuple[Turn, ...]
    producer: Turn | None = None

    def bounds(self, masked: bool = False) -> dict[str, float]:
        """Cycles of a multiprocessor that each unit needs for one tile. A consumer has one warp on every quarter."""
        turns = self.masked if masked else self.full
        every = turns + ((self.producer,) if self.producer else ())
        moved = sum(4 * turn.shared_bytes for turn in turns) + self.tile.fetched
        return {
            "tensor": sum(turn.tensor for turn in turns),
            "shared memory": (moved + sum(turn.operand_bytes for turn in turns)) / BYTES,
            "issue": float(sum(turn.instructions for turn in every)),
            **{unit: float(sum(turn.units[unit] for turn in every)) for unit in QUARTER},
            "shuffles": 4.0 * sum(turn.counts.get("shuffles", 0) for turn in turns),
        }

    def binding(self, masked: bool = False) -> str:
        bounds = self.bounds(masked)
        return max(bounds, key=lambda unit: bounds[unit])

    def rate(self, masked: bool = False, clock: float = CLOCK, processors: int = PROCESSORS) -> float:
        """TFLOP/s of unmasked area that the binding unit would allow."""
        return self.tile.area * self.tile.flops * clock * processors / max(self.bounds(masked).values()) / 1e3

    def traffic(self, clock: float = CLOCK, processors: int = PROCESSORS) -> tuple[float, float]:
        """TB/s at the bound of full tiles of all multiprocessors, mostly with the second-level cache: copied in, added up."""
        tiles = clock * processors / max(self.bounds().values()) / 1e3
        return self.tile.fetched * tiles, sum(4 * turn.added_bytes for turn in self.full) * tiles


def cost_of(flow: Flow, tile: Tile) -> Cost | None:
    """The cost of the innermost loops with products, and of the one with copies; None for a kernel without such loops."""
    ways = [flow.ways(loop) for loop in flow.innermost("HGMMA")]
    copies = [flow.ways(loop)[0] for loop in flow.innermost("UTMALDG")]
    if not ways:
        return None
    full, masked = (tuple(Turn.of(way[place]) for way in ways) for place in (0, 1))
    return Cost(tile, full, masked, Turn.of(copies[-1]) if copies else None)


def spills_in_loops(flow: Flow) -> int:
    """How many instructions of the innermost loops with matrix products move registers to local memory or back."""
    blocks = [flow.blocks[block] for loop in flow.innermost("HGMMA") for block in loop.blocks]
    return sum(classify(instruction)[0] == "spills" for block in blocks for instruction in block)
