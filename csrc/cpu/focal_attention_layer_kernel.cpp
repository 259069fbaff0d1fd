// The focal attention layer at the level it is compiled for; see gram.h and window_blocks.h.
//
// Pass 1 runs down a strip of the image: norm, projection to q, k, v of a few rows into a ring in the second cache,
// depthwise convolution, Gram matrices of tiles. q and k never reach memory; v waits in the output's own memory.
// Pass 2 (after the softmax, attend of channel_attention_kernel.cpp): attention of a tile, projection, residual.
// Bytes a pixel: read x twice, write and read v, write out: 5 * C * sizeof(T), and the slots of channel_attention.
// FLOP a pixel: 8 * C * C + 8 * C * d + 54 * C.
#include "focal_attention_layer_kernel.h"

#include "depthwise.h"
#include "rows.h"
#include "units.h"
#include "window_attend.h"

namespace ipt_fast::cpu {
namespace {

char* packed_part(const FocalAttentionLayerParams& p, int64_t part) {
    return static_cast<char*>(p.packed) + part * p.packed_part_bytes();
}

template <typename T, typename Unit>
void pack(const FocalAttentionLayerParams& p, const Unit& unit, int64_t begin, int64_t end) {
    const int64_t d = p.groups.head_channels, heads = p.groups.heads;
    for (int64_t part = begin; part < end; ++part) {
        Weight w = p.project;
        if (part < 3 * heads) {  // part % 3 of q, k, v of head part / 3
            w = p.qkv;
            w.columns = d;
            w.data = static_cast<const T*>(w.data) + (part % 3 * heads + part / 3) * d * w.column_stride;
        }
        unit.template pack<T>(w, packed_part(p, part));
    }
}

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
    GramStrip(const FocalAttentionLayerParams& p, const Unit& unit, int64_t index, float* scratch)
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
        left_ = g_.horizontal.begin(first_block_) - 1;
        width_ = g_.horizontal.end(last_block_ - 1) + 1 - left_;
        normal_ = reinterpret_cast<typename Unit::Value*>(pixels_ + p.pixels_size());
        ring_ = pixels_ + (1 + kTileRows) * p.pixels_size();
        tile_scratch_ = ring_ + p.ring_size();
    }

    // One row of blocks. The one above it may have left rows in the ring.
    void block_row(int64_t index, bool continued) {
        const WindowBlock first(g_.vertical, g_.horizontal, block_index(index, first_block_));
        int64_t next = continued ? first.y + 1 : first.y - 1;
        for (int64_t top = 0; top < first.rows; top += first.tile_rows()) {
            const int64_t bottom = top + first.tile_rows() < first.rows ? top + first.tile_rows() : first.rows;
            fill(next, first.y + bottom + 1);
            next = first.y + bottom + 1;
            for (int64_t b = first_block_; b < last_block_; ++b) {
                const int64_t at = block_index(index, b);
                const WindowBlock block(g_.vertical, g_.horizontal, at);
                for (int64_t i = 0; i < block.tiles_across(); ++i) {
                    const int64_t t = top / block.tile_rows() * block.tiles_across() + i;
                    for (int64_t head = first_head_; head < last_head_; ++head) {
                        with_both_or_first(g_, block, [&](auto branches) {
                            gram<decltype(branches)>(block.tile(t), head, g_.slot(at, head), t == 0);
                        });
                    }
                }
            }
        }
    }

  private:
    int64_t block_index(int64_t y, int64_t x) const {
        return (image_ * g_.vertical.blocks() + y) * g_.horizontal.blocks() + x;
    }
    int64_t pixel_index(int64_t y, int64_t x) const { return (image_ * g_.vertical.size + y) * g_.horizontal.size + x; }
    // Row 1 is at the ring's beginning: the rows that a tile adds, its last ones and one below, lie next to each other.
    static int64_t ring_row(int64_t y) { return (y + kRingRows - 1) % kRingRows; }
    float* ring(int64_t head, int64_t row) const {
        return ring_ + ((head - first_head_) * kRingRows + row) * width_ * 3 * g_.depth;
    }

    // Rows begin to end (without it) of q, k and v, before the depthwise convolution, into the ring.
    void fill(int64_t begin, int64_t end) {
        const int64_t height = g_.vertical.size, channels = p_.channels(), row = padded(channels);
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
                unit_.multiply(pixels, packed_part(p_, part), {first, count * width_, g_.head_channels, 3 * g_.depth},
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
    int64_t outside_right() const { return left_ + width_ > g_.horizontal.size ? 1 : 0; }

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
        const int64_t channels = p_.channels();
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
        T* v = static_cast<T*>(p_.out) + pixel_index(tile.y, tile.x) * channels + head * g_.head_channels;
        convolve<B>(
            tile, head, 2,
            [&](int64_t y, int64_t x, int64_t c, Vec value, auto&) __attribute__((always_inline)) {
                T* pixel = v + (y * g_.horizontal.size + x) * channels;
                if (c + kLanes <= g_.head_channels) {
                    store(pixel + c, value);
                } else if (c < g_.head_channels) {
                    store(pixel + c, value, g_.head_channels - c);
                }
            },
            [](int64_t, const auto&) {});
        staged.add(tile, weights, {slot, g_.norms(slot, 0), g_.factors(slot)}, begin, [&](float* rows) {
            convolve<B>(
                tile, head, 1,
                [&](int64_t y, int64_t x, int64_t c, Vec value, auto&) {
                    store(rows + (y * tile.columns + x) * g_.depth + c, value);
                },
                [](int64_t, const auto&) {});
        });
    }

    // body(y, x, c, value, squares) for a tile of q, k or v (part 0, 1, 2) after the depthwise convolution, one vector
    // of channels at a time; then end(c, squares).
    template <typename B, typename Body, typename End>
    void convolve(const Tile& tile, int64_t head, int64_t part, const Body& body, const End& end) const {
        const int64_t pixel = 3 * g_.depth;
        for (int64_t c = 0; c < g_.depth; c += kLanes) {
            const int64_t first = part * g_.depth + c;
            const float* rows[kTileRows + 2];
            for (int64_t i = 0; i < tile.rows + 2; ++i) {
                rows[i] = ring(head, ring_row(tile.y + i - 1)) + (tile.x - 1 - left_) * pixel + first;
            }
            const Taps taps{p_.depthwise + head * 10 * pixel + first, pixel};
            Vec squares[B::count]{};
            const auto put = [&](int64_t y, int64_t x, Vec value) { body(y, x, c, value, squares); };
            if (tile.rows == kTileRows) {
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

    const FocalAttentionLayerParams& p_;
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

template <typename T, typename Unit>
void gram(const FocalAttentionLayerParams& p, const Unit& unit, int64_t begin, int64_t end, float* scratch) {
    memset(scratch, 0, p.gram_scratch() * sizeof(float));  // the padding of channels stays zero
    const int64_t down = p.groups.vertical.blocks();
    for (int64_t index = begin; index < end; ++index) {
        GramStrip<T, Unit>(p, unit, index / down, scratch).block_row(index % down, index > begin && index % down > 0);
    }
}

// Asks for x and v of a tile.
template <typename T>
void prefetch(const FocalAttentionLayerParams& p, const WindowBlock& block, int64_t t) {
    const Tile tile = block.tile(t);
    const Groups& g = p.groups;
    for (int64_t y = 0; y < tile.rows; ++y) {
        const int64_t pixel = (block.image * g.vertical.size + tile.y + y) * g.horizontal.size + tile.x;
        prefetch_values(static_cast<const T*>(p.out) + pixel * p.channels(), tile.columns * p.channels());
        prefetch_values(static_cast<const T*>(p.x) + pixel * p.channels(), tile.columns * p.channels());
    }
}

template <typename T, typename Unit>
void apply(const FocalAttentionLayerParams& p, const Unit& unit, int64_t begin, int64_t end, float* scratch) {
    memset(scratch, 0, p.apply_scratch() * sizeof(float));
    const Groups& g = p.groups;
    const int64_t channels = p.channels(), row = p.attended_row();
    float* attended = scratch + apply_scratch(g);
    float* result = attended + kTileTokens * row;
    auto* left = reinterpret_cast<typename Unit::Value*>(attended);
    if constexpr (sizeof(*left) != sizeof(float)) {
        left = reinterpret_cast<typename Unit::Value*>(result + kTileTokens * row);
    }
    for (int64_t index = begin; index < end; ++index) {
        const int64_t b = index / p.block_shares, share = index % p.block_shares;
        const WindowBlock block(g.vertical, g.horizontal, b);
        const int64_t last = (share + 1) * block.tiles() / p.block_shares;
        for (int64_t t = share * block.tiles() / p.block_shares; t < last; ++t) {
            const Tile tile = block.tile(t);
            const int64_t first = ((block.image * g.vertical.size + tile.y) * g.horizontal.size + tile.x) * channels;
            T* out = static_cast<T*>(p.out) + first;
            if (t + 1 < block.tiles()) {
                prefetch<T>(p, block, t + 1);
            } else if (b + 1 < g.blocks()) {
                prefetch<T>(p, WindowBlock(g.vertical, g.horizontal, b + 1), 0);
            }
            for (int64_t head = 0; head < g.heads; ++head) {
                // the padding of a head's columns is overwritten by the next head
                const int64_t c = head * g.head_channels;
                const Matrix v{out + c, tile.rows * g.horizontal.size, g.head_channels, channels};
                const Matrix values{attended + c, tile.tokens(), g.depth, row};
                with_both_or_first(g, block, [&](auto branches) {
                    apply_tile<decltype(branches)>(g, unit, head, tile, g.slot(b, head), v, values, scratch);
                });
            }
            if constexpr (sizeof(*left) != sizeof(float)) {
                for (int64_t i = 0; i < tile.tokens() * row; i += kLanes) {
                    store(left + i, load(attended + i));
                }
            }
            const Epilogue epilogue = p.epilogue.of_image(block.image);
            const Matrix projected{result, tile.tokens(), channels, row};
            unit.multiply({left, tile.tokens(), channels, row}, packed_part(p, 3 * g.heads), projected, Accumulate::no);
            for (int64_t y = 0; y < tile.rows; ++y) {
                const int64_t offset = y * g.horizontal.size * channels;
                store_rows(projected.slice(y * tile.columns, tile.columns), static_cast<const T*>(p.x) + first + offset,
                           out + offset, epilogue);
            }
        }
    }
}

void pack_any(const FocalAttentionLayerParams& p, int64_t begin, int64_t end) {
    with_types(p.dtype, p.brgemm, [&](auto type, const auto& unit) { pack<decltype(type)>(p, unit, begin, end); });
}

void gram_any(const FocalAttentionLayerParams& p, int64_t begin, int64_t end, float* scratch) {
    with_types(p.dtype, p.brgemm,
               [&](auto type, const auto& unit) { gram<decltype(type)>(p, unit, begin, end, scratch); });
}

void apply_any(const FocalAttentionLayerParams& p, int64_t begin, int64_t end, float* scratch) {
    with_types(p.dtype, p.brgemm,
               [&](auto type, const auto& unit) { apply<decltype(type)>(p, unit, begin, end, scratch); });
}

}  // namespace

constinit const FocalAttentionLayerKernels FocalAttentionLayerKernels::IPT_FAST_LEVEL = {cpu::pack_any, cpu::gram_any,
                                                                                         cpu::apply_any};

}  // namespace ipt_fast::cpu
