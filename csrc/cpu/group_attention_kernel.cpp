// Attention inside groups of pixels of maps of queries, keys and values, at the level it is compiled for.
//
// An item is one head of one group: its pixels are gathered from the maps, together with those of other items where
// heads are narrow, attention runs on them in the first and second cache (group_attend.h), and the result goes straight
// back to its pixels. The maps are read once, but for
// windows of keys that overlap, and the output is written once: 4 * channels values a pixel; 4 * keys * channels FLOP
// and keys * heads exponentials a pixel.
#include "group_attend.h"

namespace ipt_fast::cpu {
namespace {

// Each column divided by its length, times the factor.
void normalize_columns(Matrix<float> tokens, float factor) {
    for (int64_t c = 0; c < tokens.columns; c += kLanes) {
        Vec squares{};
        for (int64_t i = 0; i < tokens.rows; ++i) {
            const Vec value = load(tokens.row(i) + c);
            squares = fma(value, value, squares);
        }
        const Vec scale = factor / max(broadcast(1e-12f), sqrt(squares));
        for (int64_t i = 0; i < tokens.rows; ++i) {
            float* const value = tokens.row(i) + c;
            store(value, load(value) * scale);
        }
    }
}

template <typename T, typename Unit>
void forward(const GroupAttentionParams& p, const Unit& unit, int64_t begin, int64_t end, float* memory) {
    ScratchStack scratch{memory};
    int64_t* const query_list = reinterpret_cast<int64_t*>(scratch.take(list_size(p.queries)));
    int64_t* const key_list = reinterpret_cast<int64_t*>(scratch.take(list_size(p.keys)));
    float* const for_q = scratch.take(gathered_size(p, p.queries));
    float *const for_k = scratch.take(gathered_size(p, p.keys)), *const for_v = scratch.take(gathered_size(p, p.keys));
    const int64_t channels = channels_of(p), depth = p.depth;
    for (int64_t item = begin, heads; item < end; item += heads) {
        const int64_t first = item % p.heads, rest = p.heads - first < end - item ? p.heads - first : end - item;
        heads = rest < heads_at_once(p) ? rest : heads_at_once(p);
        const GroupPair g(p, item / p.heads);
        const int64_t image = g.image(p), queries = g.queries.tokens(), keys = g.keys.tokens();
        list_pixels(p.queries, g.queries, query_list);
        list_pixels(p.keys, g.keys, key_list);
        const auto of_heads = [&](const Pixels& map, const TokenGroups& groups, const int64_t* list, int64_t count) {
            const T* const of_image = static_cast<const T*>(map.data) + image * groups.pixels() * map.stride;
            return ListedPixels<const T>{of_image + first * depth, map.stride, list, count};
        };
        const int64_t rows = heads * depth;
        const Matrix all_q{for_q, rows, padded(queries), padded(queries)};
        const Matrix all_k{for_k, rows, padded(keys), padded(keys)}, all_v{for_v, rows, padded(keys), padded(keys)};
        load_columns(of_heads(p.q, p.queries, query_list, queries), all_q);
        load_columns(of_heads(p.k, p.keys, key_list, keys), all_k);
        load_columns(of_heads(p.v, p.keys, key_list, keys), all_v);
        for (int64_t i = 0; i < heads; ++i) {
            const Matrix q = all_q.slice(i * depth, depth), k = all_k.slice(i * depth, depth),
                         v = all_v.slice(i * depth, depth);
            if (p.temperature == nullptr) {
                scale_rows(q, nullptr, p.scale * kLog2E);
            } else {
                normalize_columns(q, p.temperature[first + i] * kLog2E);
                normalize_columns(k, 1.0f);
            }
            attend(p, unit, g, first + i, {q.data, depth, queries, q.stride}, {k.data, depth, keys, k.stride},
                   {v.data, depth, keys, v.stride}, q, scratch);
        }
        T* const out = static_cast<T*>(p.out) + image * p.queries.pixels() * channels + first * depth;
        store_columns(all_q, ListedPixels<T>{out, channels, query_list, queries},
                      [](Vec value, int64_t, int64_t, int64_t) { return value; });
    }
}

void forward_any(const GroupAttentionParams& p, int64_t begin, int64_t end, float* scratch) {
    with_types(p.dtype, p.brgemm,
               [&](auto type, const auto& unit) { forward<decltype(type)>(p, unit, begin, end, scratch); });
}

}  // namespace

constinit const GroupAttentionKernels GroupAttentionKernels::IPT_FAST_LEVEL = {cpu::forward_any};

}  // namespace ipt_fast::cpu
