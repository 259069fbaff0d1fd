// The depthwise convolution, 3 x 3, of both passes of the focal attention layer: of a tile in shared memory, by a warp.
#pragma once

#include "warp_tiles.cuh"

namespace ipt_fast::cuda {

constexpr int kConvolvedChannels = 8, kConvolvedRows = 4;  // of convolve_rows

// Two channels of float, two columns wide and `rows` down, begun at the pixel above and left of the first:
// emit(row, sums of [column][channel]).
template <class Emit>
IPT_FAST_DEVICE void convolve_strip(const float* from, int stride, int across, int rows, const float* taps,
                                    int tap_stride, Emit emit) {
    float tap[9][2];
#pragma unroll
    for (int i = 0; i < 9; ++i) {
        load_pair(taps + i * tap_stride, tap[i][0], tap[i][1]);
    }
    // Every row of pixels is the lowest of one row of sums, the middle of the next, and the highest of that after it.
    float low[2][2] = {}, middle[2][2] = {};
#pragma unroll 1
    for (int row = 0; row < rows + 2; ++row) {
        float in[4][2];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            load_pair(from + (row * across + i) * stride, in[i][0], in[i][1]);
        }
        float sums[2][2];
#pragma unroll
        for (int v = 0; v < 4; ++v) {
            const int i = v / 2, c = v % 2;
            float done = low[i][c], next = middle[i][c], begun = 0;
#pragma unroll
            for (int x = 0; x < 3; ++x) {
                done += in[i + x][c] * tap[6 + x][c];
                next += in[i + x][c] * tap[3 + x][c];
                begun += in[i + x][c] * tap[x][c];
            }
            sums[i][c] = done;
            low[i][c] = next;
            middle[i][c] = begun;
        }
        sync_warp();
        if (row >= 2) {
            emit(row - 2, sums);
        }
    }
}

// Eight channels of up to four rows of `columns` pixels by a warp, begun at the pixel above and left of the first:
// emit(row, column, channel, sum, sum of the next channel), which may write to that row and column of `from`, as no
// lane reads the row any more. Values of 16 bits by tensor cores: a row of pixels, moved by a tap, times the tap's
// weights on the diagonal of a matrix, two taps at a time.
template <class T, class Emit>
IPT_FAST_DEVICE void convolve_rows(const T* from, int stride, int across, int columns, int rows, const T* taps,
                                   int tap_stride, Emit emit) {
    const int lane = lane_index();
    if constexpr (sizeof(T) == 4) {
        const int channel = lane % 4 * 2, x = lane / 4 * 2;
        convolve_strip(from + (x < columns ? x : 0) * stride + channel, stride, across, rows, taps + channel,
                       tap_stride, [&](int y, const float (&sums)[2][2]) {
                           if (x < columns) {
                               emit(y, x, channel, sums[0][0], sums[0][1]);
                           }
                           if (x + 1 < columns) {
                               emit(y, x + 1, channel, sums[1][0], sums[1][1]);
                           }
                       });
    } else {
        uint32_t diagonal[9];
#pragma unroll
        for (int i = 0; i < 9; ++i) {
            const uint32_t bits = taps[i * tap_stride + lane / 4].bits;
            const int place = lane / 4 - lane % 4 * 2;
            diagonal[i] = place == 0 ? bits : place == 1 ? bits << 16 : 0;
        }
        // Columns beyond the last repeat it, and rows too: their sums go nowhere.
        const T* own = from + (lane % 16 < columns ? lane % 16 : columns - 1) * stride;
        const int side = lane / 16, line = across * stride;
        const auto row_at = [&](int row) { return own + (row < rows + 1 ? row : rows + 1) * line; };
        // As loaded they are operands: of each row its left and middle taps, of two rows their right taps.
        uint32_t left[kConvolvedRows + 2][4], right[kConvolvedRows / 2 + 1][4];
#pragma unroll
        for (int y = -1; y < kConvolvedRows; ++y) {
#pragma unroll
            for (int row = y < 0 ? 0 : y + 2; row < y + 3; ++row) {
                load_matrices(left[row], row_at(row) + side * stride);
                if (row % 2 == 0) {
                    load_matrices(right[row / 2], row_at(row + side) + 2 * stride);
                }
            }
            if (y >= 0 && y < rows) {
                // The right tap that remains of three: twice, as zeros times any other could be no zeros.
                const bool even = y % 2 == 0;
                const uint32_t* its = right[(even ? y + 2 : y) / 2] + (even ? 0 : 2);
                const uint32_t last[4] = {its[0], its[1], its[0], its[1]};
                float sums[4] = {};
                multiply_add(sums, left[y], diagonal[0], diagonal[1], T{});
                multiply_add(sums, left[y + 1], diagonal[3], diagonal[4], T{});
                multiply_add(sums, left[y + 2], diagonal[6], diagonal[7], T{});
                multiply_add(sums, right[(y + 1) / 2], diagonal[even ? 2 : 5], diagonal[even ? 5 : 8], T{});
                multiply_add(sums, last, diagonal[even ? 8 : 2], 0, T{});
                sync_warp();
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    if (lane / 4 + i * 8 < columns) {
                        emit(y, lane / 4 + i * 8, lane % 4 * 2, sums[2 * i], sums[2 * i + 1]);
                    }
                }
            }
        }
    }
}

}  // namespace ipt_fast::cuda
