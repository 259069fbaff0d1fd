"""Following warps through machine code written by hand: lanes that part, integers by way of shared memory."""

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install ipt-fast[triton])")

from benchmarks import lanes, sass, warp  # noqa: E402, needs Triton


def assembled(*lines):
    """[Instruction] of lines like "@P0 BRA 0x20"; instruction i is at 16 i."""
    empty = "/* 0x0000000000000000 */"
    code = [f"/*{16 * i:04x}*/ {line} ; {empty}\n {empty}" for i, line in enumerate(lines)]
    return sass.parse("Function : by_hand\n" + "\n".join(code))


def followed(lines, warps=1, parameters=None):
    code, shared = assembled(*lines), {}
    block = [warp.Warp(code, parameters or {}, (0, 0, 0), i, 32 * warps, (1, 1, 1), shared) for i in range(warps)]
    return [[trace.counts[i] for i in range(len(lines))] for trace in warp.together(block)]


def test_a_loop_lasts_as_long_as_its_last_lane():
    lines = [
        "S2R R0, SR_TID.X",
        "MOV R1, RZ",
        "VIADD R1, R1, 0x1",
        "ISETP.LE.AND P0, PT, R1, R0, PT",
        "@P0 BRA 0x20",
        "ISETP.NE.AND P1, PT, R1, R0, PT",  # R1 is lane + 1 now, in all lanes
        "@!P1 BRA 0x20",
        "EXIT",
    ]
    assert followed(lines) == [[1, 1, 32, 32, 32, 1, 1, 1]]


def test_lanes_that_part_execute_both_sides():
    lines = [
        "S2R R0, SR_TID.X",
        "ISETP.LT.AND P0, PT, R0, 0x8, PT",
        "@P0 BRA 0x50",
        "MOV R1, 0x2",
        "BRA 0x60",
        "MOV R1, 0x3",
        "VIADD R1, R1, 0xffffffff",
        "ISETP.NE.AND P1, PT, R1, RZ, PT",
        "@P1 BRA 0x60",
        "EXIT",
    ]
    assert followed(lines) == [[1, 1, 1, 1, 1, 1, 3, 3, 3, 1]]  # as long as the 3 of some lanes


@pytest.mark.parametrize("trips", [1, 7])
def test_a_number_goes_through_shared_memory_to_another_warp(trips):
    lines = [
        "S2R R0, SR_TID.X",
        "ISETP.NE.AND P0, PT, R0, RZ, PT",
        "@P0 BRA 0x50",
        "LDC R1, c[0x0][0x210]",
        "STS [RZ+0x10], R1",
        "BAR.SYNC 0x0",
        "LDS R3, [RZ+0x10]",
        "VIADD R3, R3, 0xffffffff",
        "ISETP.NE.AND P1, PT, R3, RZ, PT",
        "@P1 BRA 0x70",
        "EXIT",
    ]
    first, second = followed(lines, warps=2, parameters={0x210: (trips, 4)})
    assert first == [1, 1, 1, 1, 1, 1, 1, trips, trips, trips, 1]
    assert second == [1, 1, 1, 0, 0, 1, 1, trips, trips, trips, 1]


@pytest.mark.parametrize(("a", "b"), [(1000, 7), (4_000_000_000, 3), (5, 4096), (2**32 - 1, 2**32 - 1)])
def test_sums_products_and_comparisons_wrap_as_32_bits_do(a, b):
    lines = [
        "LDC R0, c[0x0][0x210]",
        "LDC R1, c[0x0][0x214]",
        "IADD3 R2, P0, R0, R1, RZ",
        "IMAD.WIDE.U32 R4, R0, R1, RZ",
        "IADD3 R6, P1, R0, -R1, RZ",
        "ISETP.LT.AND P2, PT, R0, R1, PT",
        "SHF.R.S32.HI R7, RZ, 0x3, R0",
        "LOP3.LUT R8, R0, R1, RZ, 0x3c, !PT",
        "EXIT",
    ]
    one = warp.Warp(assembled(*lines), {0x210: (a, 4), 0x214: (b, 4)}, (0, 0, 0), 0, 32)
    one.follow()
    signed = [value - 2**32 if value >= 2**31 else value for value in (a, b)]
    got = one.registers["R"]
    assert got[2] == (a + b) % 2**32
    assert (got[4], got[5]) == (a * b % 2**32, a * b >> 32)
    assert got[6] == (a - b) % 2**32
    assert got[7] == (signed[0] >> 3) % 2**32
    assert got[8] == a ^ b
    assert one.registers["P"][:3] == [a + b >= 2**32, a >= b, signed[0] < signed[1]]


@pytest.mark.parametrize(
    ("addresses", "width", "wavefronts"),
    [(range(0, 128, 4), 4, 1), (range(0, 32 * 128, 128), 4, 32), ([0] * 32, 4, 1), (range(0, 512, 16), 16, 4),
     (range(0, 32 * 128, 128), 16, 32), (range(0, 256, 8), 8, 2), (range(0, 64, 2), 2, 1)],
)  # fmt: skip
def test_bank_conflicts(addresses, width, wavefronts):
    assert lanes.bank_conflicts(np.array(addresses), width) == wavefronts


def test_a_kernel_that_does_not_end_is_told(monkeypatch):
    monkeypatch.setattr(warp, "MOST_STEPS", 100)
    with pytest.raises(RuntimeError, match="does not end within 100"):
        followed(["MOV R0, RZ", "BRA 0x10"])
