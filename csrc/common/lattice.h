// The dilated lattices of grid attention, framework-free: which pixels attend to each other.
#pragma once

#include <stdint.h>

#include "marks.h"

namespace ipt_fast {

// A map of height x width pixels cut into grid x grid cubbies; a group is the pixels at one position in its cubby.
struct Lattice {
    int64_t height, width, grid;
};

// Internal linkage: code of two levels must never be merged.
namespace {

// The pixels of a group: lattice row a and column b, both from 0, at pixel(a, b) of the map. Lattice points beyond the
// border, always the last rows and columns, are not part of it.
struct Group {
    int64_t first, row_step, column_step;
    int64_t rows, columns;

    IPT_FAST_BOTH int64_t tokens() const { return rows * columns; }
    IPT_FAST_BOTH int64_t pixel(int64_t a, int64_t b) const { return first + a * row_step + b * column_step; }
};

IPT_FAST_BOTH inline int64_t cubby(int64_t size, const Lattice& l) { return (size + l.grid - 1) / l.grid; }
IPT_FAST_BOTH inline int64_t group_count(const Lattice& l) { return cubby(l.height, l) * cubby(l.width, l); }

// Groups are in raster order over the positions, so that the pixels of consecutive groups lie side by side.
IPT_FAST_BOTH inline Group group_of(const Lattice& l, int64_t index) {
    const int64_t dy = cubby(l.height, l), dx = cubby(l.width, l), y = index / dx, x = index % dx;
    return {y * l.width + x, dy * l.width, dx, (l.height - y + dy - 1) / dy, (l.width - x + dx - 1) / dx};
}

}  // namespace
}  // namespace ipt_fast
