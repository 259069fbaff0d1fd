"""What a warp does beside computing: lanes that go apart and together again, time, and banks of shared memory."""

import numpy as np

from . import sass
from .integers import known_bool


class Lanes:
    """Which lanes are active: ``active`` is True (all) or an array.

    Where they part at a branch ahead, those that skip wait at its target; where they part at the end of a loop, those
    that are done wait behind it. When all that are active jump over a place where others wait, as the first part of an
    if-else does, the others go on from there.
    """

    def __init__(self):
        self.active = True
        self.waiting = []  # [place, the branch at a loop's end or None, lanes that are active again from it on]

    def arrive(self, at):
        """At instruction ``at``: those that wait there join in."""
        while self.waiting and self.waiting[-1][0] == at and self.waiting[-1][1] is None:
            self.active = self.waiting.pop()[2]

    def branch(self, at, target, taken):
        """The instruction after the branch ``at``, which the lanes ``taken`` (True, False or an array) take."""
        taken = known_bool(taken if self.active is True else taken & self.active)
        everyone = taken is True or (taken is not False and self.active is not True and (taken == self.active).all())
        if target <= at:
            return self._loop(at, target, taken, everyone)
        if taken is False:
            return at + 1
        if not everyone:
            self.waiting.append([target, None, self.active])
            self.active = self.active & ~taken
            return at + 1
        while self.waiting:
            place, loop, before = self.waiting[-1]
            if loop is not None and at <= loop < target:  # out of the loop
                self.active = self.waiting.pop()[2]
            elif loop is None and at < place < target:  # the others do what is jumped over
                self.active = known_bool(before & ~self.active)
                self.waiting[-1] = [target, None, before]
                return place if self.active is not False else target
            else:
                break
        return target

    def _loop(self, at, target, taken, everyone):
        inside = self.waiting and self.waiting[-1][1] == at
        if taken is False:
            if inside:
                self.active = self.waiting.pop()[2]
            return at + 1
        if not everyone:
            if not inside:
                self.waiting.append([at + 1, at, self.active])
            self.active = taken
        return target

    def leave(self, at):
        """The instruction after the end of the kernel for the active lanes, or None where no others wait."""
        while self.waiting:
            place, _, before = self.waiting.pop()
            others = known_bool(before & ~self.active) if self.active is not True else False
            if others is not False:
                self.active = others
                return place
        return None


class Clock:
    """Cycles of a warp that is alone: instructions in order, each after its stall and what it waits for.

    ``seen``: the sectors it has loaded or stored; ``cached``: whether the next load finds all of its in the cache.
    """

    def __init__(self):
        self.now, self.seen, self.cached = 0, set(), False
        self.ready = [0] * 6
        self.copies, self.products = [], 0

    def issue(self, each):
        for barrier in range(6):
            if each.waits >> barrier & 1:
                self.now = max(self.now, self.ready[barrier])
        if each.name == "DEPBAR" and self.copies:  # of asynchronous copies all but the last so many
            left = int(each.operands[-1], 16)
            done = self.copies[: len(self.copies) - left]
            if done:
                self.now = max(self.now, done[-1])
        elif each.name == "WARPGROUP" and "DEPBAR" in each.modifiers:
            self.now = max(self.now, self.products)
        latency = sass.CACHED_LATENCY if self.cached else sass.LATENCY.get(each.name, sass.OTHER_LATENCY)
        self.cached = False
        if each.name == "HGMMA":
            self.products = max(self.products, self.now + 32) + sass.matrix_cycles(each)
        elif each.name == "LDGDEPBAR":
            self.copies.append(self.now + latency)
        elif each.sets < 6:
            self.ready[each.sets] = max(self.ready[each.sets], self.now + latency)
        if each.releases < 6:
            self.ready[each.releases] = max(self.ready[each.releases], self.now + sass.OTHER_LATENCY)
        self.now += each.stall


def bank_conflicts(addresses, width):
    """Wavefronts of shared memory, which serves 32 banks of 4 bytes at once: 8 or 16 bytes by halves or quarters."""
    if width <= 4:
        words = np.unique(addresses // 4)
        return int(np.bincount(words % 32).max())
    together = 128 // width
    total = 0
    for first in range(0, len(addresses), together):
        words = np.unique(addresses[first : first + together] // 4)
        words = np.unique((words[:, None] + np.arange(width // 4)).ravel())
        total += int(np.bincount(words % 32).max())
    return total
