"""Loops, ways and costs read from machine code: a made-up kernel whose figures are counted by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distattn.kernels.machine_code import Flow, Instruction, parse
from distattn.kernels.machine_cost import Cost, Tile, Turn, classify, cost_of, product_cost, shared_bytes, spills_in_loops

LINES = """
S2R R0, SR_TID.X
BRX R4 -0x1d0
USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0
@!P0 BRA 0x20
MOV R1, R2
SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R12
@!P0 BRA 0x1e0
WARPGROUP.ARRIVE
HGMMA.64x128x16.F32.BF16 R24, gdesc[UR32], RZ, !UPT
UIADD3.64 UR42, UR38, 0x2, URZ
HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR12].tnspB, R88, gsb0
WARPGROUP.DEPBAR.LE gsb0, 0x1
@P0 BRA 0x100
FSEL R31, R31, -INF , !P0
STL [R1], R31
LDL R31, [R1]
FMNMX R12, R24, R25, !PT
WARPGROUP.DEPBAR.LE gsb0, 0x0
MUFU.EX2 R19, R19
FFMA R19, R24, UR9, -R12.reuse
IMAD.MOV.U32 R16, RZ, RZ, R15
SHFL.BFLY PT, R12, R23, 0x2, 0x1f
@P1 BRA 0x50
@P2 BRA 0x40
UTMALDG.2D [UR16], [UR8]
SYNCS.ARRIVE.TRANS64 RZ, [UR12], R4
@P1 BRA 0x180
EXIT
NOP
BRA 0x1d0
SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R12
@!P0 BRA 0x1e0
BRA 0x70
"""
CODE = parse("".join(f"        /*{16 * n:04x}*/   {line} ;   /* 0x00 */\n" for n, line in enumerate(LINES.strip().splitlines())))


def test_a_line_is_read() -> None:
    assert len(CODE) == 33
    jump = CODE[6]
    assert (jump.at, jump.predicate, jump.name, jump.target, jump.falls_through) == (0x60, "@!P0", "BRA", 0x1E0, True)
    assert not CODE[27].falls_through and not CODE[1].falls_through and Instruction(0, "BRA.DIV UR4, 0x10").falls_through
    assert CODE[13].body == "FSEL R31, R31, -INF , !P0" and CODE[13].target is None


def test_loops_leave_out_second_tries() -> None:
    flow = Flow(CODE)
    assert flow.starts >= {0x0, 0x20}, "what stands behind a jump table is reached"
    assert [loop.header for loop in flow.loops] == [0x20, 0x40, 0x50, 0x180, 0x1D0, 0x1E0]
    inner, copies = flow.innermost("HGMMA"), flow.innermost("UTMALDG")
    assert [loop.header for loop in inner] == [0x50] and [loop.header for loop in copies] == [0x180]
    short, long = flow.ways(inner[0])
    assert [i.at for i in short] == [*range(0x50, 0xD0, 0x10), *range(0x100, 0x170, 0x10)]
    assert [i.at for i in long] == [*range(0x50, 0x170, 0x10)], "with the mask, and without what is tried again"
    assert spills_in_loops(flow) == 2


def test_a_tile_costs_what_its_instructions_do() -> None:
    cost = cost_of(Flow(CODE), Tile(16384, 512, 1280))
    assert cost is not None and cost.producer is not None
    full, masked = cost.full[0], cost.masked[0]
    assert (full.instructions, masked.instructions, cost.producer.instructions) == (15, 18, 3)
    assert full.counts == {
        "waits": 4, "control": 3, "products": 2, "uniform": 1, "maxima": 1, "exponentials": 1, "float32": 1, "moves": 1,
        "shuffles": 1,
    }  # fmt: skip
    assert full.order == "2 products | wait 1 | 1 maxima | wait 0 | 1 exponentials 1 float32 1 shuffles"
    assert masked.order.startswith("2 products | wait 1 | 1 selections 1 maxima | wait 0")
    assert (full.tensor, full.operand_bytes) == (128, 32 * 192 + 32 * 128)
    assert cost.bounds() == {
        "tensor": 128, "shared memory": 90, "issue": 18, "special": 8, "float32": 3, "integer": 2, "uniform": 2, "shuffles": 4,
    }  # fmt: skip
    assert cost.bounds(True)["integer"] == 4 and cost.binding() == "tensor"
    assert cost.rate(clock=2.0, processors=100) == pytest.approx(16384 * 512 * 2.0 * 100 / 128 / 1e3)
    assert cost.traffic(2.0, 100) == (pytest.approx(1280 * 2.0 * 100 / 128 / 1e3), 0)
    twice = replace(cost, full=cost.full * 2)
    assert twice.bounds()["tensor"] == 256 and twice.bounds()["issue"] == 33 and twice.rate() == pytest.approx(cost.rate() / 2)
    assert cost_of(Flow(CODE[:8]), cost.tile) is None


@pytest.mark.parametrize(
    "text, kind, unit, cycles",
    [
        ("F2FP.BF16.F32.PACK_AB R1, R2, R3", "conversions", "integer", 2),
        ("F2I.FTZ.U32.TRUNC.NTZ R1, R2", "conversions", "special", 8),
        ("IMAD.U32 R15, RZ, RZ, UR16", "moves", "float32", 2),
        ("IMAD.U32 R15, R3, R4, R5", "integers", "float32", 2),
        ("@!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR44], RZ", "waits", "", 0),
        ("UTMALDG.2D [UR8], [UR16]", "copies", "", 0),
        ("UMOV UR35, 0x40000040", "uniform", "uniform", 2),
        ("REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR38][R14.64], R152", "adds", "", 0),
        ("LDS.64 R14, [R222+UR34+0x30000]", "shared", "", 0),
        ("LDL R14, [R1]", "spills", "", 0),
        ("ISETP.GE.AND P0, PT, R1, R2, PT", "integers", "integer", 2),
    ],
)
def test_kinds(text: str, kind: str, unit: str, cycles: int) -> None:
    assert classify(Instruction(0, text)) == (kind, unit, cycles)


def test_products_read_shared_memory() -> None:
    """At 64 x 64 with both operands there tensor cores and memory are even; below, memory binds."""
    for n, cycles in ((256, 128), (128, 64), (64, 32), (32, 16)):
        both = product_cost(Instruction(0, f"HGMMA.64x{n}x16.F32.BF16 R24, gdesc[UR32], RZ, !UPT"))
        one = product_cost(Instruction(0, f"HGMMA.64x{n}x16.F32 R24, R152, gdesc[UR12].tnspB, R24"))
        assert both == (cycles, 32 * (n + 64)) and one == (cycles, 32 * n)
        assert (both[1] / 128 > cycles) == (n < 64)
    with pytest.raises(ValueError, match="of 16-bit numbers, found 'HGMMA.64x128x32"):
        product_cost(Instruction(0, "HGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR32], RZ, !UPT"))


def test_bytes_of_shared_memory_and_of_adds() -> None:
    sizes = {
        "LDS.64 R1, [R2]": 128,
        "STS R1, [R2]": 128,
        "STS.64 [R1], R2": 256,
        "STS.128 [R1], R2": 512,
        "STSM.16.M88.4 [R1], R2": 512,
    }
    assert {text: shared_bytes(Instruction(0, text)) for text in sizes} == sizes
    add = Instruction(0, "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR38][R14.64], R152")
    turn = Turn.of((add, add, Instruction(16, "REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR38][R14.64], R152")))
    assert turn.added_bytes == 512 + 512 + 128
    cost = Cost(Tile(1, 1, 0), (turn,), (turn,))
    assert cost.traffic(1.0, 1000)[1] == pytest.approx(4 * turn.added_bytes / 3)
