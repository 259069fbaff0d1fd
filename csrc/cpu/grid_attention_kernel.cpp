// Grid attention on a map of queries, keys and values, for the translation unit's instruction set.
//
// An item is one head of one group: its rows are gathered from the map, attention runs on them in the first and second
// cache (attention.h), and the rows go straight back to their pixels. qkv is read once and the output written once:
// 4 * channels values a pixel; 4 * tokens * channels FLOP and tokens * heads exponentials a pixel.
#include "attention.h"

namespace ipt_fast::cpu {
namespace {

template <typename T>
void forward(const GridAttentionParams& p, int64_t begin, int64_t end, float* memory) {
    Scratch scratch{memory};
    const int64_t channels = channels_of(p), depth = p.depth, row = padded(depth);
    const int64_t groups = group_count(p.lattice), pixels = p.lattice.height * p.lattice.width;
    float* rows[3];
    for (float*& piece : rows) {
        piece = scratch.take(head_size(p));
    }
    for (int64_t item = begin; item < end; ++item) {
        const int64_t head = item % p.heads, image = item / p.heads / groups;
        const Group group = group_of(p.lattice, item / p.heads % groups);
        const T* qkv = static_cast<const T*>(p.qkv) + image * pixels * 3 * channels + head * depth;
        for (int64_t i = 0; i < 3; ++i) {
            gather(group, qkv + i * channels, 3 * channels, depth, rows[i], row);
        }
        T* out = static_cast<T*>(p.out) + image * pixels * channels + head * depth;
        attend(p, group, p.bias + head * bias_size(p), rows[0], rows[1], rows[2], scratch,
               [&](int64_t first, int64_t count, const float* attended, const float* factors) {
                   for_pixels(group, first, count, [=](int64_t token, int64_t pixel) {
                       const int64_t i = token - first;
                       for_vectors(depth, [=](int64_t c, int64_t n) {
                           store(out + pixel * channels + c, load(attended + i * row + c) * factors[i], n);
                       });
                   });
               });
    }
}

void forward_any(const GridAttentionParams& p, int64_t begin, int64_t end, float* scratch) {
    with_type(p.dtype, [&](auto type) { forward<decltype(type)>(p, begin, end, scratch); });
}

}  // namespace

constinit const GridAttentionKernels GridAttentionKernels::IPT_FAST_LEVEL = {cpu::forward_any};

}  // namespace ipt_fast::cpu
