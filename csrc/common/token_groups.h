// Which pixels of a map attend to each other, framework-free: those of a window, or of a dilated lattice.
#pragma once

#include <stdint.h>

#include "marks.h"

namespace ipt_fast {

// One axis of a map, cut into groups. A group has `most` pixels, less those beyond the border.
struct TokenAxis {
    int64_t size;  // pixels
    int64_t groups, most;
    int64_t step;           // from a pixel of a group to its next one
    int64_t start, stride;  // group i begins at start + i * stride, the first one maybe before the map

    // Pixels at one position inside their cubbies, of which there are `grid`.
    IPT_FAST_INLINE IPT_FAST_BOTH static TokenAxis lattices(int64_t size, int64_t grid) {
        const int64_t cubby = (size + grid - 1) / grid;
        return {size, cubby, (size + cubby - 1) / cubby, cubby, 0, 1};
    }
    // Windows, of which a whole one begins at `shift`, with a margin of so many pixels on both sides.
    IPT_FAST_INLINE IPT_FAST_BOTH static TokenAxis windows(int64_t size, int64_t window, int64_t shift,
                                                           int64_t margin = 0) {
        const int64_t start = shift > 0 ? shift - window : 0;
        return {size, (size - start + window - 1) / window, window + 2 * margin, 1, start - margin, window};
    }
};

// Internal linkage: code of two levels must never be merged.
namespace {

// The pixels of a group along one axis: `count`, step pixels apart. `before` more would lie before the map.
struct TokenSpan {
    int64_t first, step, count, before;
};

IPT_FAST_BOTH inline TokenSpan span_of(const TokenAxis& axis, int64_t group) {
    const int64_t begin = axis.start + group * axis.stride;
    const int64_t before = begin < 0 ? (axis.step - 1 - begin) / axis.step : 0, first = begin + before * axis.step;
    const int64_t rest = axis.most - before, inside = (axis.size - first + axis.step - 1) / axis.step;
    return {first, axis.step, inside < rest ? inside : rest, before};
}

// The same without regard to the border: the first pixel may lie before the map and the last one behind it.
IPT_FAST_BOTH inline TokenSpan whole_span_of(const TokenAxis& axis, int64_t group) {
    return {axis.start + group * axis.stride, axis.step, axis.most, 0};
}

}  // namespace
}  // namespace ipt_fast
