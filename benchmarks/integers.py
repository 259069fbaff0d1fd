"""What the integer instructions of a warp compute, of all 32 lanes at once.

Values are ints or int64 arrays of 32 lanes, 32 bits without a sign; predicates are bools or arrays of them; None is
not known. An evaluator takes an instruction, the values of its sources and what it writes, and answers what to write.
"""

import numpy as np

MASK = 0xFFFFFFFF


class Unknown(Exception):
    """A value that is needed is not known."""


def negated(value):
    return None if value is None else not value if isinstance(value, bool) else ~value


def known_bool(value):
    """True or False where all lanes agree."""
    if value is None or isinstance(value, bool):
        return value
    value = np.asarray(value)
    return True if value.all() else False if not value.any() else value


def both(a, b):
    if a is False or b is False:
        return False
    return None if a is None or b is None else a & b


def either(a, b):
    if a is True or b is True:
        return True
    return None if a is None or b is None else a | b


def signed(value):
    return ((value & MASK) ^ 0x80000000) - 0x80000000


def wide(low, high):
    """The signed 64-bit number of two halves."""
    return signed(high) << 32 | (low & MASK)


def wrapped(value):
    """Of a Python int the signed 64-bit number with the same lower bits, as arrays have it."""
    if isinstance(value, int):
        return ((value & (2**64 - 1)) ^ 2**63) - 2**63
    return value


def chosen(condition, a, b):
    if isinstance(condition, bool):
        return a if condition else b
    if a is None or b is None:
        raise Unknown
    return np.where(condition, a, b)


def _carry(value):
    """Of a sum of numbers without a sign: whether it exceeds 32 bits, and whether by two of them."""
    return (value >> 32) > 0, (value >> 32) > 1


def _truth(value):
    return bool(value) if isinstance(value, (bool, int)) else value


class Evaluator:
    """``pairs``: positions of sources that are 64-bit numbers, given as a tuple of halves."""

    def __init__(self, function, pairs=lambda each: (), partial=False):
        self.function, self.pairs, self.partial = function, pairs, partial

    def readers(self, warp, each, sources):
        pairs = self.pairs(each)
        found = []
        for position, text in enumerate(sources):
            if position in pairs:
                low, high = warp.read_pair(text)
                found.append(lambda low=low, high=high: (low(), high()))
            else:
                found.append(warp.read(text))
        return found

    def __call__(self, each, values, targets):
        if not self.partial and any(_has_unknown(value) for value in values):
            return (None,) * len(targets)
        try:
            return tuple(plain(value) for value in self.function(each, values, targets))
        except Unknown:
            return (None,) * len(targets)


def _has_unknown(value):
    return any(part is None for part in value) if isinstance(value, tuple) else value is None


def plain(value):
    """``value`` as an int or a bool where it is one number."""
    return value.item() if isinstance(value, np.ndarray | np.generic) and np.ndim(value) == 0 else value


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def _add3(each, values, targets):
    numbers, carries = values[:3], values[3:]
    total = sum(numbers[1:], numbers[0])
    if "X" in each.modifiers:
        for carry in carries:
            total = total + carry
    return total & MASK, *_carry(total)


def _lea(each, values, targets):
    if "HI" in each.modifiers:
        a, b, *rest = values
        if "SX32" in each.modifiers:
            high, (shift, *rest) = signed(a) >> 31, rest
        else:
            high, shift, *rest = rest
        total = ((wide(a, high) << shift) >> 32 & MASK) + b if shift else (high & MASK) + b
    else:
        a, b, shift, *rest = values
        total = (a << shift & MASK) + b
    if "X" in each.modifiers:
        total = total + rest[-1]
    return total & MASK, *_carry(total)


def _multiply(each, values, targets):
    a, b, c, *carry = values
    unsigned = "U32" in each.modifiers
    if "WIDE" in each.modifiers or "HI" in each.modifiers:
        if not unsigned:
            a, b = signed(a), signed(b)
        elif not isinstance(a, int) or not isinstance(b, int):  # wraps as it should
            a, b = np.asarray(a, dtype=np.int64), np.asarray(b, dtype=np.int64)
        product, third = wrapped(a * b), wide(*c)
        total = wrapped(product + third + (carry[-1] if "X" in each.modifiers else 0))
        if "HI" in each.modifiers:
            return ((total >> 32) & MASK,)
        full = (unsigned_64(product) + unsigned_64(third)) if len(targets) > 2 else None
        over = () if full is None else (full >= 2.0**64,)
        return total & MASK, (total >> 32) & MASK, *over
    total = wrapped(a * b) + c
    if "X" in each.modifiers and carry:
        total = total + carry[-1]
    return (total & MASK,)


def unsigned_64(value):
    return np.asarray(value, dtype=np.float64) + np.where(np.asarray(value) < 0, 2.0**64, 0.0)


def _set(each, values, targets):
    a, b, *predicates = values
    if a is None or b is None:
        result = None
    else:
        if "U32" not in each.modifiers:
            a, b = signed(a), signed(b)
        else:
            a, b = a & MASK, b & MASK
        kind = each.modifiers[0]
        result = {
            "EQ": lambda: a == b, "NE": lambda: a != b, "LT": lambda: a < b, "LE": lambda: a <= b,
            "GT": lambda: a > b, "GE": lambda: a >= b, "T": lambda: True, "F": lambda: False,
        }[kind]()  # fmt: skip
        if "EX" in each.modifiers:
            low = predicates[1]
            equal = _truth(a == b)
            if kind == "EQ":
                result = both(_truth(result), low)
            elif kind == "NE":
                result = either(_truth(result), low)
            else:
                strict = _truth(a < b if kind in ("LT", "LE") else a > b)
                result = either(strict, both(equal, low))
        result = _truth(result)
    other = predicates[0]
    if "OR" in each.modifiers:
        return either(result, other), either(negated(result), other)
    if "XOR" in each.modifiers:
        return (None, None) if result is None or other is None else (result ^ other, negated(result) ^ other)
    return both(result, other), both(negated(result), other)


def _logic(each, values, targets):
    a, b, c, table = values[:4]
    if a is None or b is None or c is None:
        raise Unknown
    result = 0
    for bit in range(8):
        if table >> bit & 1:
            part = (a if bit & 4 else ~a) & (b if bit & 2 else ~b) & (c if bit & 1 else ~c)
            result = result | part
    result = result & MASK
    return (_truth(result != 0), result) if targets[0][0] in ("P", "UP") else (result,)


def _predicate_logic(each, values, targets):
    a, b, c, first, second = values
    found = []
    for table in (first, second):
        result = False
        for bit in range(8):
            if int(table) >> bit & 1:
                term = both(
                    both(a if bit & 4 else negated(a), b if bit & 2 else negated(b)), c if bit & 1 else negated(c)
                )
                result = either(result, term)
        found.append(result)
    return tuple(found)


def _shift(each, values, targets):
    a, shift, c = values
    if not isinstance(shift, int) and {"U64", "S64"} & {*each.modifiers}:
        raise Unknown
    shift = min(shift, 63) if isinstance(shift, int) else np.minimum(shift, 63)
    if "L" in each.modifiers:
        if "HI" in each.modifiers:  # the upper half
            return ((wide(a, c) << shift) >> 32 & MASK,)
        return (wrapped(a << shift) & MASK,)
    if "S32" in each.modifiers:
        return (signed(c if "HI" in each.modifiers else a) >> shift & MASK,)
    if "U32" in each.modifiers:
        return ((c if "HI" in each.modifiers else a) >> shift & MASK,)
    high = signed(c) if "S64" in each.modifiers else c & MASK
    return ((a >> shift | high << 32 - shift if shift < 32 else high >> shift - 32) & MASK,)


def _extend(each, values, targets):
    value, bits = values
    value = value & ((1 << bits) - 1)
    if "U32" not in each.modifiers:
        value = (value ^ (1 << (bits - 1))) - (1 << (bits - 1))
    return (value & MASK,)


def _permute(each, values, targets):
    a, selector, b = values
    result = 0
    for byte in range(4):
        select = selector >> (4 * byte) & 15
        if not isinstance(select, int):
            raise Unknown
        part = (a if select & 7 < 4 else b) >> (8 * (select & 3)) & 255
        if select & 8:
            part = (part >> 7) * 255
        result = result | part << (8 * byte)
    return (result & MASK,)


def _least(each, values, targets):
    numbers, least = values[:-1], values[-1]
    a, b = (numbers[0] + numbers[1] & MASK, numbers[2]) if each.name == "VIADDMNMX" else numbers
    if "U32" not in each.modifiers:
        a, b = signed(a), signed(b)
    return (np.where(_truth(a < b) == least, a, b) & MASK,)


def _select(each, values, targets):
    a, b, condition = values
    if condition is None:
        raise Unknown
    value = chosen(condition, a, b)
    if value is None:
        raise Unknown
    return (value & MASK,)


def _first_lane(each, values, targets):
    value = values[0]
    return (value if isinstance(value, int) else int(np.asarray(value).flat[0]) & MASK,)


def _shuffle(each, values, targets):
    value, lane, _ = values
    if isinstance(value, int):
        return True, value
    kind, lanes = each.modifiers[0], np.arange(32)
    if kind == "BFLY":
        return True, value[lanes ^ lane]
    if kind == "IDX":
        return True, value[np.broadcast_to(lane, (32,)) & 31]
    raise Unknown


# ---- divisions, by way of floating-point numbers --------------------------------------------------------------------


def _bits(value):
    return np.asarray(value, dtype=np.float32).view(np.uint32).astype(np.int64)


def _float(value):
    return np.asarray(value & MASK).astype(np.uint32).view(np.float32).astype(np.float64)


def _to_float(each, values, targets):
    value = values[0]
    if isinstance(value, tuple):
        value = unsigned_64(wide(*value)) if "U64" in each.modifiers else wide(*value)
    elif "U32" not in each.modifiers:
        value = signed(value)
    number = np.asarray(value, dtype=np.float64)
    rounded = number.astype(np.float32)
    if "RP" in each.modifiers:
        rounded = np.where(rounded < number, np.nextafter(rounded, np.float32(np.inf)), rounded)
    return (_bits(rounded),)


def _to_integer(each, values, targets):
    if "F32" in each.modifiers[1:] or "TRUNC" not in each.modifiers:
        raise Unknown
    value = np.nan_to_num(np.trunc(_float(values[0])))
    if len(targets) == 2:
        high = np.floor(value / 2.0**32)
        return (value - high * 2.0**32).astype(np.int64) & MASK, high.astype(np.int64) & MASK
    return (np.clip(value, -(2.0**31), 2.0**32 - 1).astype(np.int64) & MASK,)


def _special_function(each, values, targets):
    if each.modifiers[0] != "RCP":
        raise Unknown
    with np.errstate(all="ignore"):
        return (_bits(1.0 / _float(values[0])),)


def _two_halves(each, values, targets):
    """Constants are often made by adding two 16-bit numbers to zero times zero."""
    a, b, high, low = values
    if a not in (0, 0x100000000) or b != 0:
        raise Unknown
    if "BF16_V2" in each.modifiers:
        high, low = (int(_bits(float(half))) >> 16 for half in (high, low))
    else:
        high, low = (int(np.float16(half).view(np.uint16)) for half in (high, low))
    return (high << 16 | low,)


def _move(each, values, targets):
    return tuple(value & MASK for value in values[: len(targets)])


def _constant(each, values, targets):
    low = values[0]
    if isinstance(low, tuple):
        return low
    return (low & (0xFF if "U8" in each.modifiers else 0xFFFF if "U16" in each.modifiers else MASK),)


def _pair_of_loads(each):
    return (0,) if "64" in each.modifiers or each.name == "CS2R" and "32" not in each.modifiers else ()


def _pair_of_product(each):
    return (2,) if "WIDE" in each.modifiers or "HI" in each.modifiers else ()


EVALUATE = {
    "IADD3": Evaluator(_add3),
    "VIADD": Evaluator(lambda each, values, targets: (values[0] + values[1] & MASK,)),
    "LEA": Evaluator(_lea),
    "IMAD": Evaluator(_multiply, _pair_of_product),
    "ISETP": Evaluator(_set, partial=True),
    "LOP3": Evaluator(_logic, partial=True),
    "PLOP3": Evaluator(_predicate_logic, partial=True),
    "SHF": Evaluator(_shift),
    "SGXT": Evaluator(_extend),
    "PRMT": Evaluator(_permute),
    "VIMNMX": Evaluator(_least),
    "IMNMX": Evaluator(_least),
    "VIADDMNMX": Evaluator(_least),
    "SEL": Evaluator(_select, partial=True),
    "IABS": Evaluator(lambda each, values, targets: (abs(signed(values[0])),)),
    "MOV": Evaluator(_move),
    "S2R": Evaluator(_move),
    "CS2R": Evaluator(_constant, _pair_of_loads),
    "LDC": Evaluator(_constant, _pair_of_loads),
    "R2UR": Evaluator(_first_lane),
    "SHFL": Evaluator(_shuffle),
    "I2F": Evaluator(_to_float, lambda each: (0,) if "U64" in each.modifiers or "S64" in each.modifiers else ()),
    "F2I": Evaluator(_to_integer),
    "MUFU": Evaluator(_special_function),
    "HFMA2": Evaluator(_two_halves),
}
EVALUATE |= {
    f"U{name}": EVALUATE[name] for name in
    ("IADD3", "LEA", "IMAD", "ISETP", "LOP3", "PLOP3", "SHF", "SGXT", "PRMT", "SEL", "MOV", "IMNMX", "VIMNMX")
}  # fmt: skip
EVALUATE |= {"S2UR": EVALUATE["S2R"], "ULDC": EVALUATE["LDC"]}
