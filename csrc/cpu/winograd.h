// Dense 3 x 3 convolutions by the minimal filtering F(2 x 2, 3 x 3) of Winograd (Lavin and Gray, CVPR 2016), in fp32.
//
// A tile of 2 x 2 results comes from 4 x 4 pixels d and the taps g as A^T ((G g G^T) * (B^T d B)) A: 16 products
// instead of 36. They are summed over the channels, so that tiles make 16 products of matrices, (tiles, channels) by
// (channels, columns). A block of tiles stays in the second cache from the pixels to the results. FLOPs are 2 * 4 *
// channels * columns a pixel instead of 2 * 9; x is read once, but for the pixels that lie in two blocks, and out
// written once.
//
// The differences of pixels spread what is not finite, and sums that overflow, over the tile. Results that are not
// finite are therefore computed again, each from its own pixels.
#pragma once

#include "dense_taps.h"

namespace ipt_fast::cpu {
namespace {

constexpr int64_t kSide = 4;                   // of a tile's pixels
constexpr int64_t kPositions = kSide * kSide;  // products of a tile
constexpr int64_t kTileBlock = 48;             // tiles of a block are a multiple, where there are so many
constexpr int64_t kBlockFloats = 128 << 10;    // all that a block keeps, in a second cache, of 512 KiB or more

struct Winograd {
    const DenseConvolutionParams& p;
    const int64_t down, across;  // tiles of an image

    explicit Winograd(const DenseConvolutionParams& params)
        : p(params), down((p.height + 1) / 2), across((p.width + 1) / 2) {}

    int64_t tiles() const { return p.images * down * across; }
    // Rows of the matrices. A position begins one vector later than a power of two would have it, lest all of them fall
    // on the same lines of the first cache.
    int64_t of_pixels(int64_t tiles) const { return tiles * padded(p.channels) + kChannelPad; }
    int64_t of_sums(int64_t tiles) const { return tiles * padded(p.columns) + kChannelPad; }
    int64_t of_weight() const { return p.channels * padded(p.columns); }

    int64_t block() const {
        const int64_t fitting = kBlockFloats / (kPositions * (padded(p.channels) + padded(p.columns)));
        const int64_t share = (tiles() + p.threads - 1) / p.threads;
        const int64_t most = fitting < share ? fitting : share;
        return most < kTileBlock ? kTileBlock : most / kTileBlock * kTileBlock;
    }
    int64_t tasks() const { return (tiles() + block() - 1) / block(); }
    int64_t scratch() const {
        return kPositions * (of_pixels(block()) + of_sums(block())) + padded(p.channels) +
               round_up(kTaps * p.channels, kChannelPad);
    }
    // Of the products at each of the positions.
    VectorUnit unit() const { return {p.brgemm}; }
    int64_t packed_size() const { return unit().packed_size(p.columns, p.channels); }
};

// G v of three values.
inline void transform_taps(Vec a, Vec b, Vec c, Vec (&out)[kSide]) {
    const Vec outer = (a + c) * 0.5f, middle = b * 0.5f;
    out[0] = a;
    out[1] = outer + middle;
    out[2] = outer - middle;
    out[3] = c;
}

// B^T v of four.
inline __attribute__((always_inline)) void transform_pixels(Vec a, Vec b, Vec c, Vec d, Vec (&out)[kSide]) {
    out[0] = a - c;
    out[1] = b + c;
    out[2] = c - b;
    out[3] = b - d;
}

template <typename T>
void pack_winograd(const DenseConvolutionParams& p, float* scratch) {
    const Winograd plan(p);
    const int64_t row = padded(p.columns);
    for_taps<T>(p, [&](int64_t column, int64_t channel, const Vec* taps) {
        Vec rows[3][kSide];
        for (int i = 0; i < 3; ++i) {
            transform_taps(taps[3 * i], taps[3 * i + 1], taps[3 * i + 2], rows[i]);
        }
        for (int j = 0; j < kSide; ++j) {
            Vec values[kSide];
            transform_taps(rows[0][j], rows[1][j], rows[2][j], values);
            for (int i = 0; i < kSide; ++i) {
                store(scratch + (i * kSide + j) * plan.of_weight() + channel * row + column, values[i]);
            }
        }
    });
    const int64_t bytes = plan.packed_size();
    for (int64_t i = 0; i < kPositions; ++i) {
        const Weight weight{scratch + i * plan.of_weight(), p.columns, p.channels, 1, row};
        plan.unit().pack<float>(weight, static_cast<char*>(p.packed) + i * bytes);
    }
}

// Where a tile's results and pixels are.
template <typename T>
struct Tile {
    int64_t image, y, x;  // of its first result

    Tile(const Winograd& plan, int64_t index)
        : image(index / (plan.down * plan.across)),
          y(index / plan.across % plan.down * 2),
          x(index % plan.across * 2) {}

    // The pixel's channels, or `outside` beyond the border.
    static const T* pixel(const DenseConvolutionParams& p, int64_t image, int64_t y, int64_t x, const T* outside) {
        const bool inside = y >= 0 && y < p.height && x >= 0 && x < p.width;
        const T* const map = static_cast<const T*>(p.x);
        return inside ? map + ((image * p.height + y) * p.width + x) * p.channels : outside;
    }
};

// pixels[position * stride + c] = B^T d B for the channels c of one tile.
template <typename T>
void load_tile(const DenseConvolutionParams& p, const Tile<T>& tile, const T* zeros, float* pixels, int64_t stride) {
    const T* sources[kSide][kSide];
    for (int64_t i = 0; i < kSide; ++i) {
        for (int64_t j = 0; j < kSide; ++j) {
            sources[i][j] = Tile<T>::pixel(p, tile.image, tile.y + i - 1, tile.x + j - 1, zeros);
        }
    }
    for_covering_vectors(p.channels, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        Vec columns[kSide][kSide];
        const auto value = [&](int i, int j) __attribute__((always_inline)) {
            return n == kLanes ? load(sources[i][j] + c) : load(sources[i][j] + c, n);
        };
#pragma GCC unroll 4
        for (int j = 0; j < kSide; ++j) {
            transform_pixels(value(0, j), value(1, j), value(2, j), value(3, j), columns[j]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < kSide; ++i) {
            Vec row[kSide];
            transform_pixels(columns[0][i], columns[1][i], columns[2][i], columns[3][i], row);
#pragma GCC unroll 4
            for (int j = 0; j < kSide; ++j) {
                store(pixels + (i * kSide + j) * stride + c, row[j]);
            }
        }
    });
}

// The results of a tile from the sums of its products. Whether all of them are finite.
template <typename T, typename Finish>
bool store_tile_results(const DenseConvolutionParams& p, const Tile<T>& tile, const float* sums, int64_t stride,
                        const Finish& finish) {
    T* const out = static_cast<T*>(p.out) + ((tile.image * p.height + tile.y) * p.width + tile.x) * p.columns;
    const bool two_down = tile.y + 1 < p.height, two_across = tile.x + 1 < p.width;
    const int64_t below = p.width * p.columns;
    Vec probe{};
    for_covering_vectors(p.columns, [&](int64_t c, int64_t n) __attribute__((always_inline)) {
        Vec columns[kSide][2];
#pragma GCC unroll 4
        for (int j = 0; j < kSide; ++j) {
            const float* const source = sums + j * stride + c;
            const Vec b = load(source + kSide * stride), d = load(source + 2 * kSide * stride);
            columns[j][0] = load(source) + b + d;
            columns[j][1] = b - d - load(source + 3 * kSide * stride);
        }
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const Vec b = columns[1][i], d = columns[2][i];
            const Vec first = columns[0][i] + b + d, second = b - d - columns[3][i];
            probe = fma(first, Vec{}, fma(second, Vec{}, probe));
            if (i == 0 || two_down) {
                T* const target = out + i * below + c;
                const auto put = [&](T* pixel, Vec sum) __attribute__((always_inline)) {
                    n == kLanes ? store(pixel, finish(c, sum)) : store(pixel, finish(c, sum), n);
                };
                put(target, first);
                if (two_across) {
                    put(target + p.columns, second);
                }
            }
        }
    });
    return sum(probe) == 0.0f;
}

// The results of a tile, each from its own pixels.
template <typename T, typename Finish>
void store_tile_directly(const DenseConvolutionParams& p, const Tile<T>& tile, const T* zeros, float* patch,
                         const Finish& finish) {
    const T* const weight = static_cast<const T*>(p.weight);
    const int64_t depth = kTaps * p.channels;
    for (int64_t y = tile.y; y < tile.y + 2 && y < p.height; ++y) {
        for (int64_t x = tile.x; x < tile.x + 2 && x < p.width; ++x) {
            for (int64_t tap = 0; tap < kTaps; ++tap) {
                const T* const pixel = Tile<T>::pixel(p, tile.image, y + tap / 3 - 1, x + tap % 3 - 1, zeros);
                for (int64_t c = 0; c < p.channels; ++c) {
                    patch[c * kTaps + tap] = load(pixel + c, 1)[0];
                }
            }
            T* const out = static_cast<T*>(p.out) + ((tile.image * p.height + y) * p.width + x) * p.columns;
            for_vectors(p.columns, [&](int64_t column, int64_t n) {
                Vec results{};
                for (int64_t i = 0; i < n; ++i) {
                    Vec products{};
                    for_vectors(depth, [&](int64_t k, int64_t count) {
                        products =
                            fma(load(patch + k, count), load(weight + (column + i) * depth + k, count), products);
                    });
                    results[i] = sum(products);
                }
                store(out + column, finish(column, results), n);
            });
        }
    }
}

template <typename T>
void convolve_winograd(const DenseConvolutionParams& p, int64_t begin, int64_t end, float* scratch) {
    const Winograd plan(p);
    const int64_t block = plan.block(), pixel_row = padded(p.channels), sum_row = padded(p.columns);
    const int64_t pixel_stride = plan.of_pixels(block), sum_stride = plan.of_sums(block);
    float* const pixels = scratch;
    float* const sums = pixels + kPositions * pixel_stride;
    float* const zeros = sums + kPositions * sum_stride;
    float* const patch = zeros + padded(p.channels);
    memset(zeros, 0, padded(p.channels) * sizeof(float));
    const T* const outside = reinterpret_cast<const T*>(zeros);
    const int64_t bytes = plan.packed_size();
    for (int64_t index = begin; index < end; ++index) {
        const int64_t first = index * block;
        const int64_t count = plan.tiles() - first < block ? plan.tiles() - first : block;
        for (int64_t i = 0; i < count; ++i) {
            load_tile<T>(p, {plan, first + i}, outside, pixels + i * pixel_row, pixel_stride);
        }
        for (int64_t i = 0; i < kPositions; ++i) {
            plan.unit().multiply({pixels + i * pixel_stride, count, p.channels, pixel_row},
                                 static_cast<const char*>(p.packed) + i * bytes,
                                 {sums + i * sum_stride, count, p.columns, sum_row}, Accumulate::no);
        }
        with_epilogue(p, [&](const auto& finish) {
            for (int64_t i = 0; i < count; ++i) {
                const Tile<T> tile(plan, first + i);
                if (!store_tile_results(p, tile, sums + i * sum_row, sum_stride, finish)) {
                    store_tile_directly(p, tile, outside, patch, finish);
                }
            }
        });
    }
}

}  // namespace
}  // namespace ipt_fast::cpu
