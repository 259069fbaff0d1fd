// Attention inside groups of pixels of maps of queries, keys and values, at the level it is compiled for.
//
// An item is one head of one group: its pixels are gathered from the maps, attention runs on them in the first and
// second cache (group_attend.h), and the result goes straight back to its pixels. The maps are read once, but for
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
    float* const for_q = scratch.take(queries_size(p));
    float *const for_k = scratch.take(keys_size(p)), *const for_v = scratch.take(keys_size(p));
    const int64_t channels = channels_of(p), depth = p.depth;
    for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item % p.heads;
        const GroupPair g(p, item / p.heads);
        const int64_t image = g.image(p), queries = g.queries.tokens(), keys = g.keys.tokens();
        list_pixels(p.queries, g.queries, query_list);
        list_pixels(p.keys, g.keys, key_list);
        const auto of_head = [&](const Pixels& map, const TokenGroups& groups, const int64_t* list, int64_t count) {
            const T* const first = static_cast<const T*>(map.data) + image * groups.pixels() * map.stride;
            return ListedPixels<const T>{first + head * depth, map.stride, list, count};
        };
        const Matrix q{for_q, depth, padded(queries), padded(queries)};
        const Matrix k{for_k, depth, padded(keys), padded(keys)}, v{for_v, depth, padded(keys), padded(keys)};
        load_columns(of_head(p.q, p.queries, query_list, queries), q);
        load_columns(of_head(p.k, p.keys, key_list, keys), k);
        load_columns(of_head(p.v, p.keys, key_list, keys), v);
        if (p.temperature == nullptr) {
            scale_rows(q, nullptr, p.scale * kLog2E);
        } else {
            normalize_columns(q, p.temperature[head] * kLog2E);
            normalize_columns(k, 1.0f);
        }
        attend(p, unit, g, head, {for_q, depth, queries, q.stride}, {for_k, depth, keys, k.stride},
               {for_v, depth, keys, v.stride}, q, scratch);
        T* const out = static_cast<T*>(p.out) + image * p.queries.pixels() * channels + head * depth;
        store_columns(q, ListedPixels<T>{out, channels, query_list, queries},
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
