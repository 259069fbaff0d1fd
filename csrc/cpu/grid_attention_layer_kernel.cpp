// The layer x + gate * project(grid_attention(qkv(norm(x)))) at the level it is compiled for.
//
// Groups are independent of each other, so a block of a few of them runs from x to the output in scratch memory: rows
// of x are gathered and normalised; for each head q, k and v are computed from them and attended (lattice_attend.h);
// the attended rows of all heads are projected, x is added, and the rows go back to their pixels. Traffic: x is read
// and the output written, 2 * channels values a pixel; the x added at the end is still in a cache. FLOP a pixel: 8 *
// channels^2 for the projections, 4 * tokens * channels for the attention.
#include "grid_attention_layer_kernel.h"

#include "lattice_attend.h"
#include "units.h"

namespace ipt_fast::cpu {
namespace {

// One piece of packed weights: q, k or v of one head. All pieces are channels deep.
template <typename Unit>
int64_t piece_size(const GridAttentionLayerParams& p) {
    return round_up(Unit::packed_size(p.depth, channels_of(p)), 64);
}

template <typename Unit>
int64_t packed_size(const GridAttentionLayerParams& p) {
    return 3 * p.heads * piece_size<Unit>(p) + Unit::packed_size(channels_of(p), channels_of(p));
}

// The pieces of qkv in the order of its columns, then the projection.
template <typename T, typename Unit>
void pack(const GridAttentionLayerParams& p, const Unit& unit, int64_t begin, int64_t end) {
    char* packed = static_cast<char*>(p.packed);
    for (int64_t piece = begin; piece < end; ++piece) {
        Weight weight = p.project;
        if (piece < 3 * p.heads) {
            weight = p.qkv;
            weight.columns = p.depth;
            weight.data = static_cast<const T*>(weight.data) + piece * p.depth * weight.column_stride;
        }
        unit.template pack<T>(weight, packed + piece * piece_size<Unit>(p));
    }
}

// Consecutive groups of one image.
struct GroupBlock {
    const Lattice& lattice;
    int64_t image, first, last;

    GroupBlock(const GridAttentionLayerParams& p, int64_t index)
        : lattice(p.lattice), image(index / blocks_of_image(p)), first(index % blocks_of_image(p) * p.block_groups) {
        const int64_t end = first + p.block_groups, groups = group_count(p.lattice);
        last = end < groups ? end : groups;
    }

    // body(group, its first row in the block); returns the number of rows.
    template <typename Body>
    int64_t for_groups(const Body& body) const {
        int64_t start = 0;
        for (int64_t index = first; index < last; ++index) {
            const Group group = group_of(lattice, index);
            body(group, start);
            start += group.tokens();
        }
        return start;
    }
};

// The epilogue of rows, in place.
void finish(Matrix<float> rows, const Epilogue& epilogue) {
    for (int64_t i = 0; i < rows.rows; ++i) {
        for (int64_t c = 0; c < rows.columns; c += kLanes) {
            float* const value = rows.row(i) + c;
            store(value, load(epilogue.gate + c) * (load(value) + load(epilogue.bias + c)));
        }
    }
}

template <typename T, typename Unit>
void forward(const GridAttentionLayerParams& p, const Unit& unit, int64_t begin, int64_t end, float* memory) {
    using Value = typename Unit::Value;
    const int64_t channels = channels_of(p), depth = p.depth, most_rows = block_rows(p);
    const int64_t row = padded(channels), head_row = padded(depth), value_row = attended_row(p);
    const int64_t pixels = p.lattice.height * p.lattice.width, image_size = pixels * channels,
                  piece = piece_size<Unit>(p);
    const char* packed = static_cast<const char*>(p.packed);
    ScratchStack scratch{memory};
    float* rows = scratch.take(most_rows * row);
    Value* normal = reinterpret_cast<Value*>(scratch.take(most_rows * row));
    Value* attended = reinterpret_cast<Value*>(scratch.take(most_rows * value_row));
    float* qkv = scratch.take(3 * most_rows * head_row);
    memset(attended, 0, most_rows * value_row * sizeof(Value));
    for (int64_t index = begin; index < end; ++index) {
        const GroupBlock block(p, index);
        const T* x = static_cast<const T*>(p.x) + block.image * image_size;
        T* out = static_cast<T*>(p.out) + block.image * image_size;
        const Matrix map{x, pixels, channels, channels};
        const Matrix all_rows{rows, most_rows, channels, row};
        const int64_t count =
            block.for_groups([&](const Group& group, int64_t start) { gather(group, map, all_rows.from(start, 0)); });
        const Matrix tokens = all_rows.slice(0, count);
        const Matrix normalized{normal, count, channels, row};
        normalize_rows(tokens, p.norm.of_image(block.image), normalized);
        for (int64_t head = 0; head < p.heads; ++head) {
            const float* bias = p.bias + head * bias_size(p);
            Matrix<float> of_head[3];
            for (int64_t i = 0; i < 3; ++i) {
                of_head[i] = {qkv + i * most_rows * head_row, count, depth, head_row};
                const bool has_bias = i == 0 && p.q_bias != nullptr;
                if (has_bias) {
                    fill_rows(p.q_bias + head * head_row, of_head[i]);
                }
                unit.multiply(normalized, packed + (i * p.heads + head) * piece, of_head[i],
                              has_bias ? Accumulate::yes : Accumulate::no);
            }
            const Matrix q = of_head[0], k = of_head[1], v = of_head[2];
            block.for_groups([&](const Group& group, int64_t start) {
                Value* target = attended + start * value_row + head * depth;
                const int64_t count = group.tokens();
                attend(p, unit, group, bias, q.slice(start, count), k.slice(start, count), v.slice(start, count),
                       scratch, [=](int64_t first, Matrix<float> values, const float* factors) {
                           for (int64_t i = 0; i < values.rows; ++i) {
                               for (int64_t c = 0; c < depth; c += kLanes) {
                                   const Vec value = load(values.row(i) + c) * factors[i];
                                   store(target + (first + i) * value_row + c, value);
                               }
                           }
                       });
            });
        }
        unit.multiply({attended, count, channels, value_row}, packed + 3 * p.heads * piece, tokens, Accumulate::no);
        if (p.epilogue.bias != nullptr) {
            finish(tokens, p.epilogue.of_image(block.image));
        }
        block.for_groups([&](const Group& group, int64_t start) {
            for_pixels(group, 0, group.tokens(), [=](int64_t token, int64_t pixel) {
                const int64_t at = pixel * channels;
                store_rows(tokens.slice(start + token, 1), x + at, out + at);
            });
        });
    }
}

int64_t packed_size_any(const GridAttentionLayerParams& p) {
    return with_types(p.dtype, p.brgemm, [&]<typename Unit>(auto, const Unit&) { return packed_size<Unit>(p); });
}

void pack_any(const GridAttentionLayerParams& p, int64_t begin, int64_t end) {
    with_types(p.dtype, p.brgemm, [&](auto type, const auto& unit) { pack<decltype(type)>(p, unit, begin, end); });
}

void forward_any(const GridAttentionLayerParams& p, int64_t begin, int64_t end, float* scratch) {
    with_types(p.dtype, p.brgemm,
               [&](auto type, const auto& unit) { forward<decltype(type)>(p, unit, begin, end, scratch); });
}

}  // namespace

constinit const GridAttentionLayerKernels GridAttentionLayerKernels::IPT_FAST_LEVEL = {cpu::packed_size_any,
                                                                                       cpu::pack_any, cpu::forward_any};

}  // namespace ipt_fast::cpu
