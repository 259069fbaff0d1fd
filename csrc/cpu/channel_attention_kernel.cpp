// Channel attention at the level it is compiled for; see gram.h and window_blocks.h.
//
// Three passes: the Gram matrices of every block and head (reads q and k once, for both branches), their sums over
// windows and the softmax, and the output (reads v once, writes out once). Bytes a pixel: 4 * C * sizeof(T) and the
// slots, slot_size * 4 / (pixels of a block) for each head. FLOP a pixel: 4 * C * d for each branch.
#include "window_attend.h"

namespace ipt_fast::cpu {
namespace {

template <typename T>
inline const T* pixel_of(const Groups& g, const Pixels& map, int64_t image, int64_t y, int64_t x) {
    return static_cast<const T*>(map.data) + g.pixel(image, y, x) * map.stride;
}

// Asks for the head's channels of a tile, if the block has it.
template <typename T>
inline void prefetch(const Groups& g, const Pixels& map, const WindowBlock& block, int64_t t, int64_t head) {
    if (t < block.tiles()) {
        const Tile tile = block.tile(t);
        for (int64_t y = 0; y < tile.rows; ++y) {
            const T* row = pixel_of<T>(g, map, block.image, tile.y + y, tile.x) + head * g.head_channels;
            for (int64_t x = 0; x < tile.columns; ++x) {
                prefetch_values(row + x * g.dilation * map.stride, g.head_channels);
            }
        }
    }
}

// The Gram matrices of one head of a block; index counts blocks and heads.
template <typename T, typename B, typename Unit>
void gram_block(const ChannelAttentionParams& p, const Unit& unit, const WindowBlock& block, int64_t index,
                float* scratch) {
    const Groups& g = p.groups;
    const GramTile<Unit, B> staged(unit, g, scratch);
    const int64_t head = index % g.heads;
    float* slot = g.slot(index / g.heads, head);
    for (int64_t t = 0; t < block.tiles(); ++t) {
        const Tile tile = block.tile(t);
        prefetch<T>(g, p.q, block, t + 1, head);
        prefetch<T>(g, p.k, block, t + 1, head);
        const auto weights = token_squares<B>(g, head, tile);
        const auto first_of = [&](const Pixels& map) {
            return pixel_of<T>(g, map, block.image, tile.y, tile.x) + head * g.head_channels;
        };
        const auto stage = [&](const Pixels& map, int64_t of_k, const auto& put) {
            const T* first = first_of(map);
            const int64_t row = g.row() * map.stride, column = g.dilation * map.stride;
            for (int64_t c = 0; c < g.depth; c += kLanes) {
                Vec squares[B::count]{};
                for (int64_t y = 0; y < tile.rows; ++y) {
                    for (int64_t x = 0; x < tile.columns; ++x) {
                        const T* pixel = first + y * row + x * column;
                        put(tile, y, x, c, load_channels(pixel, c, g.head_channels), weights, squares);
                    }
                }
                staged.put_squares(of_k, c, squares);
            }
        };
        stage(p.q, 0, [&](auto&&... token) __attribute__((always_inline)) { staged.put_q(token...); });
        stage(p.k, 1, [&](auto&&... token) __attribute__((always_inline)) { staged.put_k(token...); });
        staged.add(tile, weights, {slot, g.norms(slot, 0), g.factors(slot)}, t == 0, [&](float* rows) {
            for (int64_t y = 0; y < tile.rows; ++y) {
                const T* const pixels = first_of(p.k) + y * g.row() * p.k.stride;
                load_rows(Matrix{pixels, tile.columns, g.head_channels, g.dilation * p.k.stride},
                          Matrix{rows + y * tile.columns * g.depth, tile.columns, g.depth, g.depth});
            }
        });
    }
}

void attend(const Groups& g, int64_t begin, int64_t end, float* scratch) {
    for (int64_t index = begin; index < end; ++index) {
        const HeadWindow window(g, index);
        if (!g.unused(window.branch, window.y, window.x)) {
            attend_window(g, window, scratch);
        }
    }
}

void average(const Groups& g, int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
        average_windows(g, index / g.heads, index % g.heads);
    }
}

// The output of one head of a block.
template <typename T, typename B, typename Unit>
void apply_block(const ChannelAttentionParams& p, const Unit& unit, const WindowBlock& block, int64_t index,
                 float* scratch) {
    const Groups& g = p.groups;
    const int64_t channels = g.heads * g.head_channels, head = index % g.heads;
    float* const attended = scratch + apply_scratch(g);
    for (int64_t t = 0; t < block.tiles(); ++t) {
        const Tile tile = block.tile(t);
        prefetch<T>(g, p.v, block, t + 1, head);
        const T* first_v = pixel_of<T>(g, p.v, block.image, tile.y, tile.x) + head * g.head_channels;
        const Matrix v{first_v, tile.rows * g.width, g.head_channels, g.dilation * p.v.stride};
        const Matrix rows{attended, tile.tokens(), g.depth, g.depth};
        apply_tile<B>(g, unit, head, tile, g.slot(index / g.heads, head), v, rows, scratch);
        for (int64_t y = 0; y < tile.rows; ++y) {
            const int64_t first = g.pixel(block.image, tile.y + y, tile.x), pixel = g.dilation * channels;
            T* out = static_cast<T*>(p.out) + first * channels + head * g.head_channels;
            for (int64_t x = 0; x < tile.columns; ++x) {
                const float* row = rows.row(y * tile.columns + x);
                for_vectors(g.head_channels,
                            [&](int64_t c, int64_t n) { store(out + x * pixel + c, load(row + c), n); });
            }
        }
    }
}

void gram_any(const ChannelAttentionParams& p, int64_t begin, int64_t end, float* scratch) {
    for_blocks(p, begin, end, [&](auto type, const auto& unit, auto branches, const auto& block, int64_t index) {
        gram_block<decltype(type), decltype(branches)>(p, unit, block, index, scratch);
    });
}

void apply_any(const ChannelAttentionParams& p, int64_t begin, int64_t end, float* scratch) {
    for_blocks(p, begin, end, [&](auto type, const auto& unit, auto branches, const auto& block, int64_t index) {
        apply_block<decltype(type), decltype(branches)>(p, unit, block, index, scratch);
    });
}

}  // namespace

constinit const ChannelAttentionKernels ChannelAttentionKernels::IPT_FAST_LEVEL = {cpu::gram_any, cpu::attend,
                                                                                   cpu::average, cpu::apply_any};

}  // namespace ipt_fast::cpu
