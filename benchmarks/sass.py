"""Machine code of NVIDIA GPUs as a list of instructions, and what a warp's instructions cost on Hopper.

The 128-bit instructions of compute capability 7.0 and later; costs are in cycles of one of the four schedulers of a
multiprocessor, each of which issues one instruction of a warp a cycle.
"""

import dataclasses
import heapq
import pathlib
import re
import subprocess
import tempfile

import triton

LINE = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P[0-7T])\s+)?(?P<name>[A-Z][A-Z0-9_]*)"
    r"(?P<modifiers>(?:\.\w+)*)\s*(?P<operands>[^;]*?)\s*;"
    r"\s*/\* 0x[0-9a-f]{16} \*/\s*/\* 0x(?P<control>[0-9a-f]{16}) \*/"
    r"|^(?P<label>[.$\w]+):",
    re.MULTILINE,
)
TARGET = re.compile(r"`\(([.$\w]+)\)|\b0x([0-9a-f]+)$")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; ``target`` is the index of the one it may jump to, ``guard`` like "!P0" or "".

    ``stall``: cycles to the next one; ``sets``, ``releases``: the barrier (0 to 5, 7 is none) that its result and its
    operands answer to; ``waits``: a mask of the barriers it waits for.
    """

    guard: str
    name: str
    modifiers: tuple
    operands: tuple
    target: int | None
    stall: int
    sets: int
    releases: int
    waits: int

    @property
    def width(self):
        """Bytes a lane loads or stores."""
        sizes = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
        return next((sizes[word] for word in self.modifiers if word in sizes), 4)


def disassemble(cubin):
    """[Instruction] of the kernel in ``cubin``, bytes, with the functions it calls behind it.

    Raises:
        ValueError: there are other than one kernel in it.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        pathlib.Path(file.name).write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", "-hex", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return parse(text)


def parse(text):
    """[Instruction] of what ``nvdisasm -c -hex`` or ``cuobjdump -sass`` prints."""
    if (count := text.count("STO_CUDA_ENTRY") + len(re.findall(r"^\s*Function : ", text, re.MULTILINE))) != 1:
        raise ValueError(f"text: must be the code of one kernel; got {count}")
    labels, found = {}, []
    for match in LINE.finditer(text):
        if match["label"]:
            labels[match["label"]] = len(found)
        else:
            found.append(match)
    return [_instruction(match, labels) for match in found]


def _instruction(match, labels):
    control = int(match["control"], 16) >> 41
    operands = tuple(word.strip().removesuffix(".reuse") for word in match["operands"].split(",") if word.strip())
    target = None
    if match["name"] in ("BRA", "CALL"):
        label, address = TARGET.search(match["operands"]).groups()
        target = labels[label] if label else int(address, 16) // 16
    return Instruction(
        match["guard"] or "", match["name"], tuple(match["modifiers"].split(".")[1:]), operands, target,
        stall=max(1, control & 15), sets=control >> 5 & 7, releases=control >> 8 & 7, waits=control >> 11 & 63,
    )  # fmt: skip


def distances(code):
    """Of every instruction the least number of instructions from it to the end of the kernel."""
    into = [[] for _ in code]
    waiting = []
    for index, each in enumerate(code):
        if each.name in ("EXIT", "RET"):
            waiting.append((0, index))
        conditional = each.guard or len(each.operands) > 1
        if each.name == "BRA":
            into[each.target].append(index)
        if index + 1 < len(code) and (each.name not in ("BRA", "EXIT", "RET") or conditional):
            into[index + 1].append(index)
    found = {}
    while waiting:
        length, index = heapq.heappop(waiting)
        if index not in found:
            found[index] = length
            for before in into[index]:
                heapq.heappush(waiting, (length + (100 if code[before].name == "CALL" else 1), before))
    return [found.get(index, len(code)) for index in range(len(code))]


# ---- costs --------------------------------------------------------------------------------------------------------

# Lanes a clock and multiprocessor by NVIDIA's tables of throughput for compute capability 9.0: 128 for fp32, 64 for
# what follows here, 16 for special functions; 32 lanes or 128 bytes for loads, stores and shuffles.
ALU = {
    "IADD3", "LOP3", "ISETP", "SHF", "LEA", "PRMT", "SEL", "FSEL", "FMNMX", "FSETP", "VIADD", "VIMNMX", "VIADDMNMX",
    "IABS", "SGXT", "F2FP", "PLOP3", "P2R", "R2P", "MOV", "I2FP", "HMNMX2", "HSETP2", "VOTE", "IMNMX", "BMSK",
}  # fmt: skip
SPECIAL = {"MUFU": 8, "POPC": 8, "FLO": 8, "BREV": 8, "REDUX": 8, "F2F": 2, "I2F": 2, "F2I": 2, "FRND": 2}
MEMORY = {
    "LDS", "STS", "LDG", "STG", "LDSM", "STSM", "LDGSTS", "LDL", "STL", "LD", "ST", "ATOM", "ATOMG", "ATOMS", "RED",
    "SHFL",
}  # fmt: skip
FP64 = {"DFMA", "DADD", "DMUL", "DSETP"}
# Of what the matrix units reach with warpgroups' products, those of single warps get so much, by others' measurements.
SINGLE_WARP = 0.62


def products_of(each):
    """Multiply-adds of one warp's part of a matrix instruction; 0 for others."""
    if each.name == "HMMA":
        m, n, k = next((16, 8, int(word[3:])) for word in each.modifiers if word.startswith("168"))
        return m * n * k
    if each.name == "HGMMA":
        m, n, k = (int(side) for side in each.modifiers[0].split("x"))
        return m * n * k // 4
    return 0


def matrix_cycles(each):
    """Of the matrix unit beside a scheduler: 512 products a cycle of 16-bit numbers, half of that for TF32."""
    products = products_of(each)
    if not products:
        return 0.0
    rate = 256 if "TF32" in each.modifiers else 512
    return products / rate / (SINGLE_WARP if each.name == "HMMA" else 1.0)


def pipe_of(each, wavefronts=1.0):
    """(pipe, cycles) of one instruction beside the one cycle of its issue. ``wavefronts``: of 128 bytes of memory."""
    if each.name in MEMORY:
        return "memory", 4 * wavefronts
    if each.name in SPECIAL:
        return "special", 8 if "64" in "".join(each.modifiers) else SPECIAL[each.name]
    if each.name in ALU:
        return "integer", 2
    if each.name == "IMAD":
        return "multiplier", 2
    if each.name in FP64:
        return "fp64", 2
    if each.name.startswith("U") or each.name == "R2UR":
        return "uniform", 2
    return "issue", 1


# Cycles until a result can be used, for those that answer to a barrier: others' measurements, rounded down.
LATENCY = {
    "LDG": 400, "LD": 400, "ATOM": 400, "ATOMG": 400, "LDGSTS": 400, "LDGDEPBAR": 400, "LDS": 23, "LDSM": 29,
    "SHFL": 23, "HMMA": 33, "MUFU": 18, "LDL": 35, "ATOMS": 50,
}  # fmt: skip
CACHED_LATENCY = 33  # of a load from memory that finds its values in the first-level cache
OTHER_LATENCY = 14
