"""Follows a warp through its machine code: which instructions it executes how often, and which memory they touch.

Integers and addresses are computed for all 32 lanes from the launch's arguments, also by way of shared memory; what is
loaded from memory, and floating-point numbers, are not known. A branch that hangs on those takes the shorter way to the
end of the kernel: what they guard in these kernels is rare (numbers out of range, slow paths of divisions).
`Trace.assumed` tells where.
"""

import collections
import dataclasses
import re

import numpy as np

from . import sass
from .integers import EVALUATE, both, known_bool, negated
from .lanes import Clock, Lanes, bank_conflicts

MOST_STEPS = 1_000_000
LANES = np.arange(32, dtype=np.int64)


@dataclasses.dataclass
class Trace:
    """Of one warp: times that every instruction was issued, wavefronts and sectors of its memory accesses.

    ``skipped``: how often of these its guard was false for all lanes: it took its slot and nothing else.
    ``assumed``: indices of branches that hang on loaded values. ``cycles``: of the warp alone on a machine, with the
    stalls that its instructions ask for. ``stores``: (index, addresses, bytes a lane) of global stores, if kept.
    """

    counts: collections.Counter
    skipped: collections.Counter
    wavefronts: collections.Counter
    sectors: collections.Counter
    assumed: set
    cycles: int = 0
    stores: list | None = None


class Warp:
    """The state of a warp. Values: an int, an array of 32 lanes, or None (not known); 32 bits without a sign."""

    def __init__(self, code, parameters, block, warp, threads, grid=(1, 1, 1), shared=None):
        """``parameters``: {offset in the constant bank: (value, bytes)}; ``block``: its index in ``grid``.

        ``shared``: {address: integer} of the words of shared memory that are known, one for the warps of a block.
        """
        self.code = code
        self.shared = {} if shared is None else shared
        self.registers = {"R": [None] * 256, "UR": [None] * 64, "P": [None] * 8, "UP": [None] * 8}
        self.registers["R"][255] = self.registers["UR"][63] = 0
        self.registers["P"][7] = self.registers["UP"][7] = True
        self.constants = {}
        for offset, (value, size) in parameters.items():
            for part in range(0, size, 4):
                self.constants[offset + part] = value >> (8 * part) & 0xFFFFFFFF
        for axis in range(3):
            self.constants[4 * axis] = (threads, 1, 1)[axis]
            self.constants[12 + 4 * axis] = grid[axis]
        self.special = {"SR_TID.X": 32 * warp + LANES, "SR_LANEID": LANES, "SR_TID.Y": 0, "SR_TID.Z": 0, "SRZ": 0}
        self.special |= {f"SR_CTAID.{axis}": value for axis, value in zip("XYZ", block, strict=True)}
        self.special["SR_CgaCtaId"] = 0
        self.steps = [self._decode(each) for each in code]
        self.distance = sass.distances(code)

    # ---- operands -----------------------------------------------------------------------------------------------

    def read(self, text):
        """A function that answers the operand's value."""
        sign, text = (text[0], text[1:]) if text[:1] in "-~!" and not text[1:2].isdigit() else ("", text)
        kind, index = _register(text)
        if kind in ("P", "UP"):
            bank = self.registers[kind]
            return (lambda: negated(bank[index])) if sign == "!" else lambda: bank[index]
        if kind:
            bank = self.registers[kind]
            if sign == "-":  # with the bit that a carry needs
                return lambda: None if bank[index] is None else 0x100000000 - bank[index]
            if sign == "~":
                return lambda: None if bank[index] is None else 0xFFFFFFFF - bank[index]
            return lambda: bank[index]
        if text.startswith("c[0x0]["):
            offset = 0 if text.endswith("RZ]") else int(text[7:-1], 16) if text[7:9] == "0x" else -1
            value = self.constants.get(offset & ~3)
            value = value if value is None else value >> 8 * (offset & 3)
            if sign and value is not None:
                value = 0x100000000 - value if sign == "-" else 0xFFFFFFFF - value
        elif text in self.special:
            value = self.special[text]
        elif text.lstrip("-").startswith("0x"):
            value = int(text, 16) & 0xFFFFFFFF
        else:
            value = float(text) if re.fullmatch(r"-?[\d.]+(e[-+]\d+)?", text) else None
        return lambda: value

    def read_pair(self, text):
        """Of the 64-bit number whose lower half the operand names: both halves."""
        sign, bare = (text[0], text[1:]) if text[:1] in "-~" else ("", text)
        kind, index = _register(bare)
        if sign:
            return self.read("?"), self.read("?")
        if kind and not _is_constant(kind, index):
            return self.read(text), self.read(f"{kind}{index + 1}")
        if bare.startswith("c["):
            return self.read(text), self.read(f"c[0x0][{hex(int(bare[7:-1], 16) + 4)}]")
        return self.read(text), lambda: 0

    def address_of(self, each):
        """A function that answers the lanes' addresses of a memory instruction."""
        text = next(word for word in reversed(each.operands) if word.endswith("]") and not word.startswith("c["))
        terms, shared = [], each.name in ("LDS", "STS", "LDSM", "STSM", "ATOMS")
        for word in text[text.rindex("[") + 1 : -1].replace("+-", "+~").split("+"):
            name, _, form = word.partition(".")
            kind, index = _register(name)
            if kind is None:
                offset = -int(name[1:], 16) if name.startswith("~") else int(name, 16)
                terms.append(lambda offset=offset: offset)
            elif (form == "64" or (kind == "UR" and not shared)) and not _is_constant(kind, index):
                low, high = self.read_pair(name)
                terms += [low, lambda high=high: None if high() is None else high() << 32]
            else:
                scale = int(form[1:]) if form.startswith("X") else 1
                term = self.read(name)
                terms.append(lambda term=term, scale=scale: None if term() is None else term() * scale)

        def address():
            values = [term() for term in terms]
            return None if any(value is None for value in values) else sum(values) + 0 * LANES

        return address

    # ---- instructions -------------------------------------------------------------------------------------------

    def _decode(self, each):
        """(guard or None, run): ``run()`` answers None or {(bank, register): value}."""
        guard = self.read(each.guard) if each.guard else None
        if each.name in ("BRA", "CALL", "RET", "EXIT"):
            conditions = [self.read(word) for word in each.operands[:-1] if _register(word.lstrip("!"))[0]]
            return guard, conditions if each.name == "BRA" else []
        if each.name in ("P2R", "R2P"):
            return guard, self._packing(each)
        targets, sources = split_operands(each)
        evaluate = EVALUATE.get(each.name)
        if evaluate is None:
            unknown = dict.fromkeys(targets)
            return guard, lambda: unknown
        readers = evaluate.readers(self, each, sources)

        def run():
            results = evaluate(each, [reader() for reader in readers], targets)
            if len(results) < len(targets):
                raise AssertionError(f"{each}: {len(results)} results for {targets}")
            return dict(zip(targets, results, strict=False))

        return guard, run

    def _packing(self, each):
        """Predicates as the bits of a number, and the other way round."""
        mask, bank = int(each.operands[-1], 16), self.registers["P"]
        bits = [bit for bit in range(7) if mask >> bit & 1]
        if each.name == "R2P":
            source = self.read(each.operands[1])
            value = lambda bit: None if source() is None else known_bool((source() >> bit & 1) != 0)  # noqa: E731
            return lambda: {("P", bit): value(bit) for bit in bits}
        before, target = self.read(each.operands[2]), _register(each.operands[0])

        def pack():
            if before() is None or any(bank[bit] is None for bit in bits):
                return {target: None}
            return {target: (before() & ~mask & 0xFFFFFFFF) + sum(bank[bit] * (1 << bit) for bit in bits)}

        return pack

    def follow(self, keep_stores=False):
        """`Trace` from the entry to the end of the kernel, of a warp alone.

        Raises:
            RuntimeError: it does not end.
        """
        return together([self], keep_stores)[0]

    def steps_to_barriers(self, keep_stores):
        """A generator that follows the warp, waits at every barrier, and returns its `Trace`."""
        trace = Trace(*(collections.Counter() for _ in range(4)), set())
        trace.stores = [] if keep_stores else None
        counts, clock = [0] * len(self.code), Clock()
        accesses = {i: self.address_of(each) for i, each in enumerate(self.code) if each.name in _ADDRESSED}
        at, calls, lanes = 0, [], Lanes()
        for _ in range(MOST_STEPS):
            lanes.arrive(at)
            each, (guard, run) = self.code[at], self.steps[at]
            counts[at] += 1
            mask = True if guard is None else known_bool(guard())
            whole = mask is True  # nothing but lanes that wait keeps what it has
            if lanes.active is not True:
                mask = known_bool(both(mask, lanes.active))
            if at in accesses and mask is not False:
                self._access(at, each, accesses[at](), mask, trace, clock)
            clock.issue(each)
            if each.name == "EXIT" and guard is None:
                at = lanes.leave(at)
                if at is None:
                    break
            elif each.name == "EXIT":
                if mask is True:
                    break
                at += 1
            elif each.name == "BRA":
                at = lanes.branch(at, each.target, self._taken(at, each, mask, run, trace))
            elif each.name == "CALL" and mask is not False:
                calls.append(at + 1)
                at = each.target
            elif each.name == "RET" and mask is not False:
                if not calls:
                    break
                at = calls.pop()
            else:
                if mask is False:
                    trace.skipped[at] += 1
                elif each.name == "BAR":
                    yield
                elif each.name in ("LDS", "STS"):
                    self._through_shared(each, accesses[at](), mask, whole)
                else:
                    self._write(run(), mask, whole)
                at += 1
        else:
            raise RuntimeError(f"the kernel does not end within {MOST_STEPS} instructions; it is at {at}")
        trace.counts.update({index: count for index, count in enumerate(counts) if count})
        trace.cycles = clock.now
        return trace

    def _write(self, results, mask, whole):
        for (bank, index), value in results.items():
            if _is_constant(bank, index):
                continue
            registers = self.registers[bank]
            if mask is not True:
                before = value if whole and registers[index] is None else registers[index]
                known = value is not None and before is not None and mask is not None
                value = np.where(mask, value, before) if known else None
            registers[index] = value

    def _through_shared(self, each, address, mask, whole):
        """Integers that are stored to shared memory, and loaded from it."""
        words, lanes = max(1, each.width // 4), range(32) if not isinstance(mask, np.ndarray) else np.flatnonzero(mask)
        if each.name == "STS":
            bank, first = _register(each.operands[1])
            values = [0 if _is_constant(bank, first) else self.registers[bank][first + word] for word in range(words)]
            if address is None or each.width < 4 or (not self.shared and all(value is None for value in values)):
                return
            for word, value in enumerate(values):
                for lane in lanes:
                    place = int(address[lane]) + 4 * word
                    if value is None or mask is None:
                        self.shared.pop(place, None)
                    else:
                        self.shared[place] = value if isinstance(value, int) else int(value[lane])
            return
        bank, first = _register(each.operands[0])
        if bank is None or _is_constant(bank, first):
            return
        found = {(bank, first + word): None for word in range(words)}
        if self.shared and address is not None and each.width >= 4:
            for word in range(words):
                values = [self.shared.get(int(address[lane]) + 4 * word) for lane in lanes]
                if all(value is not None for value in values):
                    loaded = np.zeros(32, dtype=np.int64)
                    loaded[list(lanes)] = values
                    found[bank, first + word] = loaded
        self._write(found, mask, whole)

    def _taken(self, at, each, mask, conditions, trace):
        for condition in conditions:
            mask = known_bool(both(mask, condition()))
        if mask is None:
            trace.assumed.add(at)
            return self.distance[each.target] < self.distance[at + 1]
        return mask

    def _access(self, at, each, address, mask, trace, clock):
        lanes = LANES if isinstance(mask, bool) or mask is None else np.flatnonzero(mask)
        width = each.width
        if each.name in ("LDSM", "STSM"):
            rows = next((int(word) for word in each.modifiers if word in ("2", "4")), 1)
            trace.wavefronts[at] += rows if address is None else bank_conflicts(address[: 8 * rows], 16)
        elif each.name in ("LDS", "STS", "ATOMS", "LDL", "STL"):
            if address is None or each.name in ("LDL", "STL"):
                trace.wavefronts[at] += max(1, width / 4)
            else:
                trace.wavefronts[at] += bank_conflicts(address[lanes], width)
        else:
            if address is None:
                sectors = width * len(lanes) / 32
            else:
                touched = set((address[lanes] // 32).tolist())
                clock.cached = each.name == "LDG" and touched <= clock.seen
                clock.seen |= touched
                sectors = len(touched)
                if trace.stores is not None and each.name == "STG":
                    trace.stores.append((at, address[lanes], width))
            trace.sectors[at] += sectors
            trace.wavefronts[at] += max(1, sectors / 4)


def together(warps, keep_stores=False):
    """[Trace] of warps of one block, which go from barrier to barrier together, in turns."""
    running = {index: warp.steps_to_barriers(keep_stores) for index, warp in enumerate(warps)}
    found = {}
    while running:
        for index, steps in list(running.items()):
            try:
                next(steps)
            except StopIteration as end:
                found[index] = end.value
                del running[index]
    return [found[index] for index in range(len(warps))]


_ADDRESSED = sass.MEMORY - {"SHFL", "LDL", "STL"}


def _register(text):
    """(bank, index) of a register's name, or (None, 0)."""
    text = text.partition(".")[0]
    if text in _REGISTERS:
        return _REGISTERS[text]
    return None, 0


def _is_constant(bank, index):
    return index == {"R": 255, "UR": 63, "P": 7, "UP": 7}[bank]


_REGISTERS = {"RZ": ("R", 255), "URZ": ("UR", 63), "PT": ("P", 7), "UPT": ("UP", 7)}
_REGISTERS |= {f"{bank}{index}": (bank, index) for bank, most in (("R", 255), ("UR", 63), ("P", 7), ("UP", 7))
               for index in range(most)}  # fmt: skip
_SET_TWO = {"ISETP", "UISETP", "FSETP", "PLOP3", "UPLOP3", "DSETP", "HSETP2", "FSET"}
_NOTHING = {"STG", "STS", "STSM", "STL", "ST", "BAR", "LDGSTS", "DEPBAR", "MEMBAR", "FENCE", "WARPGROUP", "NOP",
            "BSSY", "BSYNC", "LDGDEPBAR", "RED", "WARPSYNC", "R2P"}  # fmt: skip


def split_operands(each):
    """([(bank, register)] that are written, the other operands)."""
    if each.name in _NOTHING:
        return [], list(each.operands)
    words, targets = list(each.operands), []
    while words and _register(words[0])[0] in ("P", "UP") and (each.name not in _SET_TWO or len(targets) < 2):
        targets.append(_register(words.pop(0)))
    if each.name not in _SET_TWO and words and _register(words[0])[0] in ("R", "UR"):
        bank, index = _register(words.pop(0))
        targets += [(bank, min(index + part, 255)) for part in range(_registers_written(each))]
        if each.name in ("IADD3", "UIADD3", "LEA", "ULEA", "IMAD", "UIMAD"):
            while words and _register(words[0])[0] in ("P", "UP"):
                targets.append(_register(words.pop(0)))
    return targets, words


def _registers_written(each):
    if each.name == "HGMMA":
        return int(each.modifiers[0].split("x")[1]) // 2
    if each.name == "HMMA":
        return 4
    if each.name == "LDSM":
        return next((int(word) for word in each.modifiers if word in ("2", "4")), 1)
    if each.name in ("LDG", "LDS", "LDL", "LD", "LDC", "ULDC"):
        return max(1, each.width // 4)
    if each.name in ("IMAD", "UIMAD"):
        return 2 if "WIDE" in each.modifiers else 1
    if each.name == "CS2R":
        return 1 if "32" in each.modifiers else 2
    if each.name == "F2I":
        return 2 if "U64" in each.modifiers or "S64" in each.modifiers else 1
    return 2 if each.name in FP64_RESULTS else 1


FP64_RESULTS = {"DFMA", "DADD", "DMUL"}
