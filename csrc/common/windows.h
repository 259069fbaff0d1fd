// How an axis of a map is cut into windows, and the windows into blocks, framework-free.
//
// A second partition ("branch" 1) has its windows shifted by p / 2 pixels, cyclically on the map padded to whole
// windows. Cut at the borders of both, every block lies in exactly one window of each branch, so whatever is summed
// over blocks serves both. Padding belongs to no block: a window at the border has smaller blocks, or fewer.
//
// Or windows overlap: all lie inside of the map, spread evenly, the first and the last at its edges. A pixel is then in
// at most two windows of an axis, and cut at all borders, every block lies in one window or in two neighbours.
#pragma once

#include <stdint.h>

#include "marks.h"

namespace ipt_fast {

// One axis of the map. Block i is part i % parts of the unshifted window i / parts. Where windows overlap, block 2 i
// lies in window i only, and block 2 i + 1 in windows i and i + 1; it is empty where these only touch.
struct Axis {
    int64_t size;      // pixels
    int64_t window;    // pixels of a window
    int64_t part;      // pixels of each part but a window's last; 0 where there is only one
    int64_t parts;     // of a window
    int64_t step = 0;  // from a window's beginning to the next one's where windows overlap, else 0

    // Windows of p pixels; with branches == 2 also those shifted by p / 2.
    IPT_FAST_INLINE IPT_FAST_BOTH static Axis windows_of(int64_t size, int64_t p, int branches) {
        const int64_t shift = branches == 2 ? p / 2 : 0;
        return {size, p, shift, shift > 0 ? 2 : 1};
    }
    // One window, in parts of the given size.
    IPT_FAST_INLINE IPT_FAST_BOTH static Axis whole(int64_t size, int64_t part) {
        const int64_t parts = (size + part - 1) / part;
        return {size, parts * part, part, parts};
    }
    // As few windows of p pixels as cover the axis, all inside of it (TLC, Chu et al., ECCV 2022).
    IPT_FAST_INLINE IPT_FAST_BOTH static Axis overlapping(int64_t size, int64_t p) {
        const int64_t others = (size - 1) / p;  // windows but the first
        return others == 0 ? windows_of(size, size, 1) : Axis{size, p, 0, 3, (size - p + others - 1) / others};
    }

    IPT_FAST_INLINE IPT_FAST_BOTH int64_t windows() const { return (size + window - 1) / window; }
    IPT_FAST_INLINE IPT_FAST_BOTH int64_t blocks() const {
        if (step > 0) {
            return 2 * windows() - 1;
        }
        const int64_t before = windows() - 1, rest = size - before * window;
        const int64_t begun = parts == 1 ? 1 : (rest + part - 1) / part;
        return before * parts + (begun < parts ? begun : parts);
    }
    IPT_FAST_INLINE IPT_FAST_BOTH int64_t begin(int64_t block) const {
        if (step > 0) {
            return block % 2 == 1 ? window_begin(block / 2 + 1) : block == 0 ? 0 : window_begin(block / 2 - 1) + window;
        }
        return block / parts * window + block % parts * part;
    }
    IPT_FAST_INLINE IPT_FAST_BOTH int64_t end(int64_t block) const {
        return block + 1 < blocks() ? begin(block + 1) : size;
    }
    // Where one of overlapping windows begins.
    IPT_FAST_INLINE IPT_FAST_BOTH int64_t window_begin(int64_t index) const {
        return index * step < size - window ? index * step : size - window;
    }
    // The first of the unshifted or overlapping windows that a block lies in, and how many they are.
    IPT_FAST_INLINE IPT_FAST_BOTH int64_t first_window(int64_t block) const { return block / (step > 0 ? 2 : parts); }
    IPT_FAST_INLINE IPT_FAST_BOTH int64_t windows_over(int64_t block) const { return step > 0 ? 1 + block % 2 : 1; }
    // Part `index` of a window; it may lie outside of the map, before the first block or at or after blocks().
    IPT_FAST_INLINE IPT_FAST_BOTH int64_t block_of(int branch, int64_t window_index, int64_t index) const {
        if (step > 0) {
            return 2 * window_index - 1 + index;
        }
        return (window_index * parts + branch * (parts - 1) + index) % (windows() * parts);
    }
    // The pixels inner_begin() to inner_end(), without it, lie at least half a window from the edges of the padded map.
    // The shifted windows but the last one, which goes around the edges, are cut from them.
    IPT_FAST_INLINE IPT_FAST_BOTH int64_t inner_begin() const { return part < size ? part : size; }
    IPT_FAST_INLINE IPT_FAST_BOTH int64_t inner_end() const {
        const int64_t end = windows() * window - part;
        return end < size ? end : size;
    }
    // Where a pixel lies in its window.
    IPT_FAST_INLINE IPT_FAST_BOTH int64_t position(int branch, int64_t pixel) const {
        return (pixel + window - branch * part) % window;
    }
};

}  // namespace ipt_fast
