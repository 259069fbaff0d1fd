// What the feed-forward network's kernels in 16 bits and of float share: GELU, and where a tile lies.
#pragma once

#include "leffn.cuh"
#include "warp_tiles.cuh"

namespace ipt_fast::cuda {

// x Phi(x). To be rounded to 16 bits: max(x, 0) - t Phi(-t) for t = |x|, with a polynomial for log2 Phi(-t) (minimax in
// the error of t Phi(-t), which is at most 6e-7, and at most 8e-5 of it for t below 3).
template <class T>
IPT_FAST_DEVICE float leffn_gelu(float x) {
    if constexpr (sizeof(T) == 4) {
        return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    } else {
        const float t = fabsf(x);
        float p = fmaf(-4.8760764e-4f, t, 7.1942489e-3f);
        p = fmaf(p, t, -5.2131362e-2f);
        p = fmaf(p, t, -4.5962036e-1f);
        p = fmaf(p, t, -1.1509821f);
        p = fmaf(p, t, -1.0000051f);
        return fmaf(-t, power_of_two(p), fmaxf(x, 0.0f));
    }
}

// Where the tile lies; positions outside of the image are nullptr.
struct LeffnPlace {
    int64_t image;  // its first pixel
    int y, x, height, width;

    IPT_FAST_DEVICE bool inside(int row, int column) const {
        return y + row >= 0 && y + row < height && x + column >= 0 && x + column < width;
    }
    IPT_FAST_DEVICE int64_t pixel(int row, int column) const { return image + (int64_t)(y + row) * width + x + column; }
};

template <class Tile>
IPT_FAST_DEVICE LeffnPlace leffn_place(const LeffnArguments& p) {
    const int across = (p.width + Tile::kWide - 1) / Tile::kWide, down = (p.height + Tile::kHigh - 1) / Tile::kHigh;
    const int64_t block = block_index(), row = block / across;
    return {row / down * p.height * p.width, (int)(row % down) * Tile::kHigh, (int)(block % across) * Tile::kWide,
            p.height, p.width};
}

}  // namespace ipt_fast::cuda
