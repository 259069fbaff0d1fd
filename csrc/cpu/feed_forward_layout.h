// What a thread of a feed-forward network keeps in its scratch memory, and where.
#pragma once

#include "feed_forward_kernel.h"
#include "thirds.h"

namespace ipt_fast::cpu {
namespace {

// Of one product of the expansion at most: the tile stays in the first cache.
constexpr int64_t kTilePixels = 64;
constexpr int64_t kChunkPixels = 32;  // columns of the depthwise convolution that are done for all rows of a step
constexpr int64_t kLine = 64;         // bytes of a line of a cache

// So many values and more, in an odd number of whole lines: with a power of two, rows would use few of a cache's sets.
template <typename Value>
constexpr int64_t odd_lines(int64_t values) {
    constexpr int64_t kOfLine = kLine / int64_t(sizeof(Value));
    return ((values + kOfLine - 1) / kOfLine | 1) * kOfLine;
}

template <typename Value>
constexpr int64_t kFilteredRow = odd_lines<Value>(kHiddenBlock);

// Values between two pixels' hidden values without a convolution.
template <typename Value>
int64_t filtered_row(const FeedForwardParams& p) {
    return odd_lines<Value>(padded(p.hidden));
}

// Where the pieces of a thread's scratch memory begin; the offset behind the last one is its size.
template <typename Value>
struct ScratchLayout {
    int64_t ring, rows, thirds, tile, filtered, sums, in, end;

    explicit ScratchLayout(const FeedForwardParams& p) {
        const int64_t width = p.strip_width() + 2 * p.radius(), channels = padded(p.channels);
        const int64_t widest = channels > kHiddenBlock ? channels : kHiddenBlock,
                      pixels = p.rows_per_step * p.strip_width(),
                      ringed = p.form.convolves ? p.form.halves() * padded(p.hidden) : 0;
        end = 0;
        ring = add(ringed * p.slots() * width * sizeof(float));
        rows = add(p.rows_per_step * width * channels * sizeof(Value));
        thirds = add(splits(p) ? (p.rows_per_step * width + kThirdsRows) * split_pairs(p.channels) * sizeof(Pair) : 0);
        tile = add((p.form.convolves ? kTilePixels : kPixels) * widest * sizeof(float));
        filtered = add((p.form.convolves ? p.rows_per_step * kChunkPixels * kFilteredRow<Value>
                                         : kPixels * filtered_row<Value>(p)) *
                       sizeof(Value));
        sums = add(pixels * padded(p.out_channels) * sizeof(float));
        in = add(p.form.halves() * p.slots() * sizeof(float*));
    }

    // Whether all blocks of hidden values are made of the same split rows (thirds.h).
    static bool splits(const FeedForwardParams& p) {
        return kMatrixUnit && sizeof(Value) == sizeof(float) && p.brgemm != nullptr;
    }

    int64_t add(int64_t bytes) {
        const int64_t offset = end;
        end += round_up(bytes, 64);
        return offset;
    }
};

}  // namespace
}  // namespace ipt_fast::cpu
