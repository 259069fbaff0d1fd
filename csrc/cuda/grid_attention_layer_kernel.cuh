// A block takes a group (Side 16, 256 tokens) or two (Side 8, 64 tokens each) from pixels to output, then another one.
//
// 16-bit values: 8 warps, each with 32 (Side 16) or 16 tokens of its own, that it gathers, normalises in place and
// projects; x stays in its registers, where the products with the output weights are added. For each head q stays in
// registers, k and v of all tokens go to shared memory; then the warp goes through all keys with a softmax whose shift
// follows the largest score, and multiplies by the head's output weights. While a block attends, the next head's
// weights and the next group's pixels arrive. Two barriers a head. float: y, k and v of all tokens are too large; 64
// are there at a time, made again for every head, and for both halves of the queries, which are of two blocks.
//
// Traffic: 2 C values a pixel; weights (4 C^2 values a group and block, for one head once a block) come from the cache.
// FLOPs a pixel: 8 C^2 + 4 tokens C in products, tokens heads powers of two. Neighbouring groups are neighbouring
// pixels, gathered in pieces of C values, 64 bytes or more: whole sectors; blocks side by side share the lines.
#pragma once

#include "grid_attention_layer_parts.cuh"

namespace ipt_fast::cuda {

template <class T, int Channels, int Width, int Side, class Layer = GridLayer<T, Channels, Width, Side>>
IPT_FAST_KERNEL IPT_FAST_BOUNDS(Layer::kThreads, Layer::kBlocks)
    grid_attention_layer_kernel(IPT_FAST_ARGUMENTS(GridAttentionLayerArguments) p) {
    auto& shared = *shared_memory<typename Layer::Shared>();
    const T* x = static_cast<const T*>(p.x);
    constexpr int tokens = Layer::kTokens, rows = Layer::kRows, stage = Layer::kStage, own = Layer::kOwn;
    constexpr int pixel = Layer::kPixel, wide = Layer::kHead;
    constexpr bool resident = Layer::kStages == 1;  // all tokens' y, k and v are there
    const int warp = warp_index(), items = (p.groups + Layer::kGroups - 1) / Layer::kGroups * Layer::kParts;

    // The warp's group: that of its queries, and of the tokens that it gathers and normalises.
    auto points_at = [&](int item) {
        return points_of(p.lattices, item / Layer::kParts * Layer::kGroups + warp * rows / tokens, p.groups);
    };
    T* own_y = shared.y + warp * own * pixel;
    // Tokens of the stage that starts with token `first` of its group.
    auto gather_own = [&](const Points& points, int first) {
        gather<T, Layer>(own_y, x, points, (first + warp * own) % tokens);
        copy_commit();
    };
    auto normalise_own = [&](const Points& points, int first) {
        normalise<T, Layer>(own_y, shared.y, p, points, (first + warp * own) % tokens);
    };

    for (int head = 0; head < Layer::kHeads; ++head) {
        load_biases<T, Side>(shared.biases + head * kBiasCount<Side>, p, Layer::kHeads, head);
    }
    load_norm<T, Layer>(shared.y, p);
    int item = (int)block_index();
    copy_qkv_weight<T, Layer>(shared.qkv_weight, p, 0);
    copy_project_weight<T, Layer>(shared.project_weight, p, 0);
    copy_commit();
    if constexpr (resident) {
        gather_own(points_at(item), 0);
    }

#pragma unroll 1
    for (; item < items; item += p.blocks) {
        const Points points = points_at(item);
        const int query = (item % Layer::kParts * Layer::kQueries + warp * rows) % tokens;
        const bool queries = row_of<Side>(query) < points.rows;  // whether any of the warp's is there
        OutRows<T, Layer> out;                                   // of 16 bits
#pragma unroll 1
        for (int head = 0; head < Layer::kHeads; ++head) {
            copy_wait<0>();
            sync_block();  // weights and pixels are there; no warp needs k, v and output weights of the last head
            if constexpr (Layer::kHeads > 1) {
                copy_project_weight<T, Layer>(shared.project_weight, p, head);
                copy_commit();
            }
            typename Layer::Attention attention;
            WarpSums<16, Width> q[Layer::kDown];
#pragma unroll
            for (auto& sums : q) {
                sums.clear();
            }
            if constexpr (resident) {
                if (head == 0) {
                    if constexpr (Layer::kShort) {
                        out.load([&](int row) -> const T* { return own_y + row * pixel; });
                        sync_warp();
                    }
                    normalise_own(points, 0);
                    sync_warp();
                }
                multiply_rows<T, Channels>(q, own_y, pixel, shared.qkv_weight, pixel, p.tf32);
            } else {
#pragma unroll 1
                for (int first = 0; first < Layer::kQueries; first += stage) {
                    const int from = item % Layer::kParts * Layer::kQueries + first;
                    gather_own(points, from);
                    copy_wait<0>();
                    sync_warp();
                    normalise_own(points, from);
                    sync_block();
                    if (warp * rows / stage * stage == first) {
                        multiply_rows<T, Channels>(q, shared.y + warp * rows % stage * pixel, pixel, shared.qkv_weight,
                                                   pixel, p.tf32);
                    }
                    sync_block();
                }
            }
            attention.begin(q);

#pragma unroll 1
            for (int first = 0; first < (resident ? 1 : points.rows * Side); first += stage) {
                if constexpr (!resident) {
                    gather_own(points, first);
                    copy_wait<0>();
                    sync_warp();
                    normalise_own(points, first);
                    sync_block();
                }
                // k of all rows, then v of all rows; each warp its own tokens', where all are there.
#pragma unroll 1
                for (int task = warp; task < 2 * stage / rows; task += Layer::kWarps) {
                    const int row = task % (stage / rows) * rows, part = task / (stage / rows);
                    WarpSums<16, Width> sums[Layer::kDown];
#pragma unroll
                    for (int i = 0; i < Layer::kDown; ++i) {
                        sums[i].clear();
                    }
                    multiply_rows<T, Channels>(sums, shared.y + row * pixel, pixel,
                                               shared.qkv_weight + (1 + part) * Width * pixel, pixel, p.tf32);
                    T* to = (part == 0 ? shared.k : shared.v) + row * wide;
#pragma unroll
                    for (int i = 0; i < Layer::kDown; ++i) {
                        sums[i].for_pairs([&](int r, int column, const float* pair) {
                            store_pair(to + (i * 16 + r) * wide + column, pair[0], pair[1]);
                        });
                    }
                }
                copy_wait<0>();
                sync_block();  // k, v and output weights are there; no warp needs y and the weights of q, k and v
                if constexpr (resident) {
                    if (Layer::kHeads > 1) {
                        copy_qkv_weight<T, Layer>(shared.qkv_weight, p, (head + 1) % Layer::kHeads);
                        copy_commit();
                    }
                    if (head == Layer::kHeads - 1 && item + p.blocks < items) {
                        gather_own(points_at(item + p.blocks), 0);
                    }
                }
                if (queries) {
                    const int base = resident ? warp * rows / tokens * tokens : 0;  // of the group in the stage
                    const int last = resident ? points.rows * Side : first + stage;
#pragma unroll 1
                    for (int key = first; key < last; key += Layer::kChunk) {
                        const int at = (base + key - first) * wide;
                        attention.attend(shared.k + at, shared.v + at,
                                         biases_of<Side>(shared.biases + head * kBiasCount<Side>, query, key), key,
                                         points, p.tf32);
                    }
                }
            }
            if constexpr (!resident && Layer::kHeads > 1) {
                copy_qkv_weight<T, Layer>(shared.qkv_weight, p, (head + 1) % Layer::kHeads);
                copy_commit();
            }
            if (queries) {
                attention.finish();
                if constexpr (Layer::kShort) {
                    out.add_projection(attention, shared.project_weight);
                } else {
                    auto offset = [&](int row) {
                        return points.has<Side>(query + row) ? points.pixel<Side>(query + row) * Channels : -1;
                    };
                    T* to = static_cast<T*>(p.out);
                    add_projection<Layer>(to, head == 0 ? x : to, offset, attention, shared.project_weight, p.tf32);
                }
            }
        }
        if constexpr (Layer::kShort) {
            const Points places = points_at(item);  // again, as registers are few
            out.store([&](int row) {
                const bool there = places.has<Side>(query + row);
                return there ? static_cast<T*>(p.out) + places.pixel<Side>(query + row) * Channels : nullptr;
            });
        }
    }
    copy_wait<0>();
}

}  // namespace ipt_fast::cuda
