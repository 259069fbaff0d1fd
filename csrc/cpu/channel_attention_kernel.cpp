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
    const int64_t pixel = (image * g.vertical.size + y) * g.horizontal.size + x;
    return static_cast<const T*>(map.data) + pixel * map.stride;
}

// Asks for the head's channels of a tile, if the block has it.
template <typename T>
inline void prefetch(const Groups& g, const Pixels& map, const WindowBlock& block, int64_t t, int64_t head) {
    if (t < block.tiles()) {
        const Tile tile = block.tile(t);
        for (int64_t y = 0; y < tile.rows; ++y) {
            const T* row = pixel_of<T>(g, map, block.image, tile.y + y, tile.x) + head * g.head_channels;
            for (int64_t x = 0; x < tile.columns; ++x) {
                prefetch_values(row + x * map.stride, g.head_channels);
            }
        }
    }
}

template <typename T, int branches, typename Unit>
void gram(const ChannelAttentionParams& p, const Unit& unit, int64_t begin, int64_t end, float* scratch) {
    const Groups& g = p.groups;
    const GramTile<Unit, branches> staged(unit, g, scratch);
    for (int64_t index = begin; index < end; ++index) {
        const WindowBlock block(g.vertical, g.horizontal, index / g.heads);
        const int64_t head = index % g.heads;
        float* slot = g.slot(index / g.heads, head);
        for (int64_t t = 0; t < block.tiles(); ++t) {
            const Tile tile = block.tile(t);
            prefetch<T>(g, p.q, block, t + 1, head);
            prefetch<T>(g, p.k, block, t + 1, head);
            const TileWeights<branches> weights = token_squares<branches>(g, head, tile);
            const auto first_of = [&](const Pixels& map) {
                return pixel_of<T>(g, map, block.image, tile.y, tile.x) + head * g.head_channels;
            };
            const auto stage = [&](const Pixels& map, int64_t of_k, const auto& put) {
                const T* first = first_of(map);
                for (int64_t c = 0; c < g.depth; c += kLanes) {
                    Vec squares[branches]{};
                    for (int64_t y = 0; y < tile.rows; ++y) {
                        for (int64_t x = 0; x < tile.columns; ++x) {
                            const T* pixel = first + (y * g.horizontal.size + x) * map.stride;
                            put(tile, y, x, c, load_channels(pixel, c, g.head_channels), weights, squares);
                        }
                    }
                    staged.put_squares(of_k, c, squares);
                }
            };
            stage(p.q, 0, [&](auto&&... token) { staged.put_q(token...); });
            stage(p.k, 1, [&](auto&&... token) { staged.put_k(token...); });
            staged.add(tile, weights, {slot, g.norms(slot, 0), g.factors(slot)}, t == 0, [&](float* rows) {
                for (int64_t y = 0; y < tile.rows; ++y) {
                    const T* const pixels = first_of(p.k) + y * g.horizontal.size * p.k.stride;
                    load_rows(Matrix{pixels, tile.columns, g.head_channels, p.k.stride},
                              Matrix{rows + y * tile.columns * g.depth, tile.columns, g.depth, g.depth});
                }
            });
        }
    }
}

void attend(const Groups& g, int64_t begin, int64_t end, float* scratch) {
    for (int64_t index = begin; index < end; ++index) {
        attend_window(g, HeadWindow(g, index), scratch);
    }
}

template <typename T, int branches, typename Unit>
void apply(const ChannelAttentionParams& p, const Unit& unit, int64_t begin, int64_t end, float* scratch) {
    const Groups& g = p.groups;
    const int64_t channels = g.heads * g.head_channels;
    float* const attended = scratch + apply_scratch(g);
    for (int64_t index = begin; index < end; ++index) {
        const WindowBlock block(g.vertical, g.horizontal, index / g.heads);
        const int64_t head = index % g.heads;
        for (int64_t t = 0; t < block.tiles(); ++t) {
            const Tile tile = block.tile(t);
            prefetch<T>(g, p.v, block, t + 1, head);
            const T* first_v = pixel_of<T>(g, p.v, block.image, tile.y, tile.x) + head * g.head_channels;
            const Matrix v{first_v, tile.rows * g.horizontal.size, g.head_channels, p.v.stride};
            const Matrix rows{attended, tile.tokens(), g.depth, g.depth};
            apply_tile<branches>(g, unit, head, tile, g.slot(index / g.heads, head), v, rows, scratch);
            for (int64_t y = 0; y < tile.rows; ++y) {
                const int64_t first = (block.image * g.vertical.size + tile.y + y) * g.horizontal.size + tile.x;
                T* out = static_cast<T*>(p.out) + first * channels + head * g.head_channels;
                for (int64_t x = 0; x < tile.columns; ++x) {
                    const float* row = rows.row(y * tile.columns + x);
                    for_vectors(g.head_channels,
                                [&](int64_t c, int64_t n) { store(out + x * channels + c, load(row + c), n); });
                }
            }
        }
    }
}

void gram_any(const ChannelAttentionParams& p, int64_t begin, int64_t end, float* scratch) {
    with_branches(p.dtype, p.brgemm, p.groups.branches, [&](auto type, const auto& unit, auto branches) {
        gram<decltype(type), decltype(branches)::value>(p, unit, begin, end, scratch);
    });
}

void apply_any(const ChannelAttentionParams& p, int64_t begin, int64_t end, float* scratch) {
    with_branches(p.dtype, p.brgemm, p.groups.branches, [&](auto type, const auto& unit, auto branches) {
        apply<decltype(type), decltype(branches)::value>(p, unit, begin, end, scratch);
    });
}

}  // namespace

constinit const ChannelAttentionKernels ChannelAttentionKernels::IPT_FAST_LEVEL = {cpu::gram_any, cpu::attend,
                                                                                   cpu::apply_any};

}  // namespace ipt_fast::cpu
