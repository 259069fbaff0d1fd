// Pass 1 of layers of channel attention: a strip of the image, from the norm to Gram matrices; see
// channel_attention_layer_kernel.cpp.
#pragma once

#include "channel_attention_layer_kernel.h"
#include "depthwise.h"
#include "gram.h"
#include "rows.h"
#include "units.h"

namespace ipt_fast::cpu {
namespace {

// A 3x3 depthwise convolution of `count` columns of `height` rows at once, one vector of channels: body(y, x, value).
// Behind the taps lies what the sums start with.
template <int height, typename Body>
inline __attribute__((always_inline)) void depthwise_rows(InputRows in, int64_t count, Taps weight, const Body& body) {
    Vec taps[3][3];
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) {
        taps[i / 3][i % 3] = load(weight.data + i * weight.stride);
    }
    const Vec start = load(weight.data + 9 * weight.stride);
    for (int64_t x = 0; x < count; ++x) {
        Vec sums[height];
#pragma GCC unroll 4
        for (int y = 0; y < height; ++y) {
            sums[y] = start;
        }
#pragma GCC unroll 6
        for (int i = 0; i < height + 2; ++i) {
#pragma GCC unroll 3
            for (int j = 0; j < 3; ++j) {
                const Vec value = load(in.rows[i] + (x + j) * in.stride);
#pragma GCC unroll 4
                for (int y = 0; y < height; ++y) {
                    if (i - y >= 0 && i - y < 3) {
                        sums[y] = fma(value, taps[i - y][j], sums[y]);
                    }
                }
            }
        }
#pragma GCC unroll 4
        for (int y = 0; y < height; ++y) {
            body(y, x, sums[y]);
        }
    }
}

// A strip of the image and a group of heads in pass 1.
template <typename T, typename Unit>
class GramStrip {
  public:
    GramStrip(const ChannelAttentionLayerParams& p, const Unit& unit, int64_t index, float* scratch)
        : p_(p),
          unit_(unit),
          g_(p.groups),
          image_(index / p.strips / p.head_groups),
          norm_(p.norm.of_image(image_)),
          pixels_(scratch) {
        const int64_t group = index / p.strips % p.head_groups, strip = index % p.strips;
        first_head_ = p.first_head(group);
        last_head_ = p.first_head(group + 1);
        first_block_ = p.first_block(strip);
        last_block_ = p.first_block(strip + 1);
        left_ = p.horizontal.begin(first_block_) - p.halo;
        width_ = p.horizontal.end(last_block_ - 1) + p.halo - left_;
        normal_ = reinterpret_cast<typename Unit::Value*>(pixels_ + p.pixels_size());
        ring_ = pixels_ + (1 + kTileRows) * p.pixels_size();
        tile_scratch_ = ring_ + p.ring_size();
    }

    // One row of blocks, of which the one above it may have left rows in the ring. False if it has no pixels.
    bool block_row(int64_t index, bool continued) {
        const int64_t halo = p_.halo;
        const WindowBlock first(p_.vertical, p_.horizontal, block_index(index, first_block_));
        int64_t next = continued ? first.y + halo : first.y - halo;
        for (int64_t top = 0; top < first.rows; top += first.tile_rows()) {
            const int64_t bottom = top + first.tile_rows() < first.rows ? top + first.tile_rows() : first.rows;
            fill(next, first.y + bottom + halo);
            next = first.y + bottom + halo;
            for (int64_t b = first_block_; b < last_block_; ++b) {
                const int64_t at = block_index(index, b);
                const WindowBlock block(p_.vertical, p_.horizontal, at);
                for (int64_t i = 0; i < block.tiles_across(); ++i) {
                    const int64_t t = top / block.tile_rows() * block.tiles_across() + i;
                    for (int64_t head = first_head_; head < last_head_; ++head) {
                        if (p_.queries != nullptr) {
                            keep(block.tile(t), head);
                            continue;
                        }
                        with_branches(g_, block, [&](auto branches) {
                            gram<decltype(branches)>(block.tile(t), head, g_.slot(at, head), t == 0);
                        });
                    }
                }
            }
        }
        return first.rows > 0;
    }

  private:
    int64_t block_index(int64_t y, int64_t x) const {
        return (image_ * p_.vertical.blocks() + y) * p_.horizontal.blocks() + x;
    }
    int64_t pixel_index(int64_t y, int64_t x) const { return (image_ * g_.height + y) * g_.width + x; }
    // The first row below a tile's halo is at the ring's beginning: the rows that a tile adds lie next to each other.
    int64_t ring_row(int64_t y) const { return (y + kRingRows - p_.halo) % kRingRows; }
    float* ring(int64_t head, int64_t row) const {
        return ring_ + ((head - first_head_) * kRingRows + row) * width_ * 3 * g_.depth;
    }

    // Rows begin to end (without it) of q, k and v, before the depthwise convolution, into the ring.
    void fill(int64_t begin, int64_t end) {
        const int64_t height = g_.height, channels = p_.channels(), row = padded(channels);
        for (int64_t y = begin, count = 1; y < end; y += count) {
            const int64_t at = ring_row(y);
            count = 1;
            if (y < 0 || y >= height) {
                for (int64_t head = first_head_; head < last_head_; ++head) {
                    put_outside(head, ring(head, at), width_);
                }
                continue;
            }
            while (count < kTileRows && at + count < kRingRows && y + count < end && y + count < height) {
                ++count;
            }
            for (int64_t i = 0; i < count; ++i) {
                normalize(y + i, normal_ + i * width_ * row);
            }
            const Matrix pixels{normal_, count * width_, channels, row};
            for (int64_t part = 3 * first_head_; part < 3 * last_head_; ++part) {
                float* const first = ring(part / 3, at) + part % 3 * g_.depth;
                unit_.multiply(pixels, p_.packed_part(part), {first, count * width_, g_.head_channels, 3 * g_.depth},
                               Accumulate::no);
            }
            for (int64_t i = 0; i < count && p_.outside != nullptr; ++i) {
                for (int64_t head = first_head_; head < last_head_; ++head) {
                    float* const row = ring(head, at + i);
                    put_outside(head, row, outside_left());
                    put_outside(head, row + (width_ - outside_right()) * 3 * g_.depth, outside_right());
                }
            }
        }
    }

    // Pixels of the strip on the left and on the right that lie outside of the image.
    int64_t outside_left() const { return left_ < 0 ? 1 : 0; }
    int64_t outside_right() const { return left_ + width_ > g_.width ? 1 : 0; }

    // What the depthwise convolution reads outside of the image, to `count` pixels of the ring.
    void put_outside(int64_t head, float* pixels, int64_t count) const {
        const int64_t pixel = 3 * g_.depth;
        if (p_.outside == nullptr) {
            memset(pixels, 0, count * pixel * sizeof(float));
            return;
        }
        for (int64_t i = 0; i < count; ++i) {
            memcpy(pixels + i * pixel, p_.outside + head * pixel, pixel * sizeof(float));
        }
    }

    // The strip's pixels of one row after the norm, with the halo; zeros outside of the image.
    void normalize(int64_t y, typename Unit::Value* out) const {
        const int64_t channels = p_.channels(), row = padded(channels);
        const int64_t count = width_ - outside_left() - outside_right();
        const T* x = static_cast<const T*>(p_.x) + pixel_index(y, left_ + outside_left()) * channels;
        memset(out, 0, outside_left() * row * sizeof(*out));
        memset(out + (width_ - outside_right()) * row, 0, outside_right() * row * sizeof(*out));
        const Matrix pixels{x, count, channels, channels};
        const Matrix normal{out + outside_left() * row, count, row, row};
        if (channels == row) {
            normalize_rows(pixels, norm_, normal);
        } else {
            const Matrix staged{pixels_, count, channels, row};
            load_rows(pixels, staged);
            normalize_rows(staged, norm_, normal);
        }
    }

    template <typename B>
    __attribute__((noinline)) void gram(const Tile& tile, int64_t head, float* slot, bool begin) const {
        const GramTile<Unit, B> staged(unit_, g_, tile_scratch_);
        const auto weights = token_squares<B>(g_, head, tile);
        convolve<B>(
            tile, head, 0,
            [&](int64_t y, int64_t x, int64_t c, Vec value, auto& squares)
                __attribute__((always_inline)) { staged.put_q(tile, y, x, c, value, weights, squares); },
            [&](int64_t c, const auto& squares) { staged.put_squares(0, c, squares); });
        convolve<B>(
            tile, head, 1,
            [&](int64_t y, int64_t x, int64_t c, Vec value, auto& squares)
                __attribute__((always_inline)) { staged.put_k(tile, y, x, c, value, weights, squares); },
            [&](int64_t c, const auto& squares) { staged.put_squares(1, c, squares); });
        keep_part(tile, head, 2, Matrix{static_cast<T*>(p_.out), 0, 0, p_.channels()});
        staged.add(tile, weights, {slot, g_.norms(slot, 0), g_.factors(slot)}, begin, [&](float* rows) {
            convolve<B>(
                tile, head, 1,
                [&](int64_t y, int64_t x, int64_t c, Vec value, auto&) {
                    store(rows + (y * tile.columns + x) * g_.depth + c, value);
                },
                [](int64_t, const auto&) {});
        });
    }

    // q, k and v of a tile to memory.
    __attribute__((noinline)) void keep(const Tile& tile, int64_t head) const {
        const int64_t channels = p_.channels();
        T* const queries = static_cast<T*>(p_.queries);
        keep_part(tile, head, 0, Matrix{queries, 0, 0, 2 * channels});
        keep_part(tile, head, 1, Matrix{queries + channels, 0, 0, 2 * channels});
        keep_part(tile, head, 2, Matrix{static_cast<T*>(p_.out), 0, 0, channels});
    }

    // A part of a tile to a map, whose rows are pixels.
    void keep_part(const Tile& tile, int64_t head, int64_t part, Matrix<T> map) const {
        T* const first = map.row(pixel_index(tile.y, tile.x)) + head * g_.head_channels;
        convolve<Branches<1, false>>(
            tile, head, part,
            [&](int64_t y, int64_t x, int64_t c, Vec value, auto&) __attribute__((always_inline)) {
                T* pixel = first + (y * g_.width + x) * map.stride;
                if (c + kLanes <= g_.head_channels) {
                    store(pixel + c, value);
                } else if (c < g_.head_channels) {
                    store(pixel + c, value, g_.head_channels - c);
                }
            },
            [](int64_t, const auto&) {});
    }

    // body(y, x, c, value, squares) for a tile of q, k or v (part 0, 1, 2) after the depthwise convolution, one vector
    // of channels at a time; then end(c, squares).
    template <typename B, typename Body, typename End>
    void convolve(const Tile& tile, int64_t head, int64_t part, const Body& body, const End& end) const {
        const int64_t pixel = 3 * g_.depth;
        for (int64_t c = 0; c < g_.depth; c += kLanes) {
            const int64_t first = part * g_.depth + c;
            const float* rows[kTileRows + 2];
            for (int64_t i = 0; i < tile.rows + 2 * p_.halo; ++i) {
                const int64_t y = ring_row(tile.y + i - p_.halo);
                rows[i] = ring(head, y) + (tile.x - p_.halo - left_) * pixel + first;
            }
            const Taps taps{p_.depthwise + head * (p_.taps() + 1) * pixel + first, pixel};
            Vec squares[B::count]{};
            const auto put = [&](int64_t y, int64_t x, Vec value) { body(y, x, c, value, squares); };
            if (p_.halo == 0) {
                const Vec start = load(taps.data);
                for (int64_t y = 0; y < tile.rows; ++y) {
                    for (int64_t x = 0; x < tile.columns; ++x) {
                        put(y, x, load(rows[y] + x * pixel) + start);
                    }
                }
            } else if (tile.rows == kTileRows) {
                depthwise_rows<kTileRows>({rows, pixel}, tile.columns, taps, put);
            } else {
                for (int64_t y = 0; y < tile.rows; ++y) {
                    depthwise_rows<1>({rows + y, pixel}, tile.columns, taps,
                                      [&](int64_t, int64_t x, Vec value) { put(y, x, value); });
                }
            }
            end(c, squares);
        }
    }

    const ChannelAttentionLayerParams& p_;
    const Unit& unit_;
    const Groups& g_;
    const int64_t image_;
    const Norm norm_;
    int64_t first_head_, last_head_, first_block_, last_block_;
    int64_t left_, width_;  // of the strip with its halo of one pixel
    float* pixels_;
    typename Unit::Value* normal_;
    float *ring_, *tile_scratch_;
};

}  // namespace
}  // namespace ipt_fast::cpu
