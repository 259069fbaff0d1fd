// Grid attention on a map of queries, keys and values, at the level it is compiled for.
//
// An item is one head of one group: its rows are gathered from the map, attention runs on them in the first and second
// cache (lattice_attend.h), and the rows go straight back to their pixels. qkv is read once and the output written
// once: 4 * channels values a pixel; 4 * tokens * channels FLOP and tokens * heads exponentials a pixel.
//
// The gradient, per group and head, in chunks of queries: the weights P are computed again, dV += P^T dO, dP = dO V^T,
// dS = P (dP - rowsum(P dP)), dQ = dS K / sqrt(d), dK += dS^T Q / sqrt(d). All of it runs on gathered rows in the first
// and second cache; qkv and the gradient are read once and the result is written once: 7 * channels values a pixel,
// 10 * tokens * channels FLOP. dS is added to its places in the bias table after every chunk, in fp32 within a group
// and in fp64 over the groups.
#include "lattice_attend.h"

namespace ipt_fast::cpu {
namespace {

template <typename T, typename Unit>
void forward(const GridAttentionParams& p, const Unit& unit, int64_t begin, int64_t end, float* memory) {
    ScratchStack scratch{memory};
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
        Matrix<float> tokens[3];
        for (int64_t i = 0; i < 3; ++i) {
            tokens[i] = {rows[i], group.tokens(), depth, row};
            gather(group, Matrix{qkv + i * channels, pixels, depth, 3 * channels}, tokens[i]);
        }
        T* out = static_cast<T*>(p.out) + image * pixels * channels + head * depth;
        attend(p, unit, group, p.bias + head * bias_size(p), tokens[0], tokens[1], tokens[2], scratch,
               [&](int64_t first, Matrix<float> attended, const float* factors) {
                   for_pixels(group, first, attended.rows, [=](int64_t token, int64_t pixel) {
                       const int64_t i = token - first;
                       for_vectors(depth, [=](int64_t c, int64_t n) {
                           store(out + pixel * channels + c, load(attended.row(i) + c) * factors[i], n);
                       });
                   });
               });
    }
}

void forward_any(const GridAttentionParams& p, int64_t begin, int64_t end, float* scratch) {
    with_types(p.dtype, p.brgemm,
               [&](auto type, const auto& unit) { forward<decltype(type)>(p, unit, begin, end, scratch); });
}

// The sum over k of body(k), rows added up in short blocks: a few short sums round less than one long one.
template <typename Body>
inline Vec sum_rows(int64_t rows, const Body& body) {
    constexpr int64_t kBlock = 8;
    Vec total{};
    for (int64_t first = 0; first < rows; first += kBlock) {
        const int64_t last = first + kBlock < rows ? first + kBlock : rows;
        Vec sum{};
        for (int64_t k = first; k < last; ++k) {
            sum += body(k);
        }
        total += sum;
    }
    return total;
}

// From the powers of the scores (weights, with the inverses of their columns' sums) and dP (slopes): P and dS in their
// places. Both have the same stride, and kLanes divides their columns.
void score_gradients(Matrix<float> weights, Matrix<float> slopes, const float* inverses) {
    const int64_t rows = weights.rows, columns = weights.columns;
    for (int64_t c = 0; c < columns; c += kLanes) {
        float *weight = weights.data + c, *slope = slopes.data + c;
        const Vec inverse = load(inverses + c);
        const Vec mean =
            sum_rows(rows, [=](int64_t k) { return load(weight + k * columns) * load(slope + k * columns); }) * inverse;
        // mean + rest is the mean to more than fp32's digits: where one weight is almost 1, little else is left of dS.
        const Vec rest = sum_rows(rows, [=](int64_t k) {
            const Vec p = load(weight + k * columns) * inverse, difference = load(slope + k * columns) - mean;
            store(weight + k * columns, p);
            store(slope + k * columns, difference);
            return p * difference;
        });
        for (int64_t k = 0; k < rows; ++k) {
            store(slope + k * columns, load(weight + k * columns) * (load(slope + k * columns) - rest));
        }
    }
}

// Adds the gradients of a chunk's scores to those of the biases they were started with: start_scores backwards.
// Neighbours in a row of keys have biases that overlap, so the next key is the one in the next row.
void add_bias_gradients(const GridAttention& p, const Group& g, Matrix<const float> gradients, int64_t first,
                        int64_t count, float* bias) {
    const int64_t rows = g.rows, columns = g.columns, row = gradients.stride;
    const int64_t last = p.lattice.grid - 1, step = bias_row(p);
    for_pieces(g, first, count, [=](int64_t a, int64_t b, int64_t start, int64_t piece) {
        for (int64_t c = 0; c < piece; c += kLanes) {
            const IntVec valid = lane_index() < static_cast<int32_t>(piece - c);
            for (int64_t key_b = 0; key_b < columns; ++key_b) {
                const float* source = gradients.row(key_b) + start + c;
                float* target = bias + (a + last) * step + last + b - key_b + c;
                for (int64_t key_a = 0; key_a < rows; ++key_a, source += columns * row, target -= step) {
                    store(target, load(target) + (valid ? load(source) : Vec{}));
                }
            }
        }
    });
}

// The rows of a group's tokens from `first` on, times a factor, to their pixels, the rows of a map.
template <typename T>
void scatter(const Group& g, int64_t first, Matrix<const float> rows, float factor, Matrix<T> map) {
    for_pixels(g, first, rows.rows, [=](int64_t token, int64_t pixel) {
        for_vectors(rows.columns, [=](int64_t c, int64_t n) {
            store(map.row(pixel) + c, load(rows.row(token - first) + c) * factor, n);
        });
    });
}

template <typename T, typename Unit>
void backward(const GridAttentionGradients& p, const Unit& unit, int64_t head, int64_t begin, int64_t end,
              float* memory, double* grad_bias) {
    const int64_t channels = channels_of(p), depth = padded(p.depth), groups = group_count(p.lattice);
    const int64_t pixels = p.lattice.height * p.lattice.width;
    const float* bias = p.bias + head * bias_size(p);
    const int64_t most = most_tokens(p.lattice);
    ScratchStack scratch{memory};
    const auto take_rows = [&] { return Matrix{scratch.take(head_size(p)), most, p.depth, depth}; };
    const Matrix<float> of_head[3] = {take_rows(), take_rows(), take_rows()};
    const Matrix all_grad = take_rows(), all_grad_k = take_rows(), all_grad_v = take_rows();
    float* const for_queries = scratch.take(chunk_size(p));
    float* const for_grad_queries = scratch.take(chunk_size(p));
    const Matrix chunk_grad_q{scratch.take(chunk_size(p)), kChunk, p.depth, depth};
    float* const for_weights = scratch.take(scores_size(p));
    float* const for_slopes = scratch.take(scores_size(p));
    float* const biases = scratch.take(bias_size(p));
    float* const rooms[] = {scratch.take(head_room(p)), scratch.take(head_room(p)), scratch.take(head_room(p))};
    float* const chunk_rooms[] = {scratch.take(chunk_size(p)), scratch.take(chunk_size(p)),
                                  scratch.take(chunk_size(p))};
    float* const scores_rooms = scratch.take(scores_room(p));
    for (int64_t item = begin; item < end; ++item) {
        const int64_t image = item / groups;
        const Group group = group_of(p.lattice, item % groups);
        const int64_t tokens = group.tokens();
        const int64_t origin = image * pixels * channels + head * p.depth,
                      origin3 = origin + 2 * image * pixels * channels;
        for (int64_t i = 0; i < 3; ++i) {
            const T* const first = static_cast<const T*>(p.qkv) + origin3 + i * channels;
            gather(group, Matrix{first, pixels, p.depth, 3 * channels}, of_head[i]);
        }
        gather(group, Matrix{static_cast<const T*>(p.grad) + origin, pixels, p.depth, channels}, all_grad);
        const Matrix q = of_head[0].slice(0, tokens), k = of_head[1].slice(0, tokens), v = of_head[2].slice(0, tokens);
        const Matrix grad_k = all_grad_k.slice(0, tokens), grad_v = all_grad_v.slice(0, tokens);
        const auto map_of = [&](int64_t i) {  // of the gradients of q, k and v
            return Matrix{static_cast<T*>(p.grad_qkv) + origin3 + i * channels, pixels, p.depth, 3 * channels};
        };
        const auto keys = unit.left(unit.rows(k, rooms[0])), values = unit.left(unit.rows(v, rooms[1]));
        const auto right_keys = unit.right(k, rooms[2]);
        memset(biases, 0, bias_size(p) * sizeof(float));
        for (int64_t first = 0; first < tokens; first += kChunk) {
            const int64_t count = tokens - first < kChunk ? tokens - first : kChunk, row = padded(count);
            const Accumulate add = first > 0 ? Accumulate::yes : Accumulate::no;
            const Matrix chunk_q = q.slice(first, count), chunk_grad = all_grad.slice(first, count);
            const Matrix grad_q = chunk_grad_q.slice(0, count);
            const Matrix weights{for_weights, tokens, row, row}, slopes{for_slopes, tokens, row, row};
            // the same without the padding, as P and dS
            const Matrix p_of_chunk{for_weights, tokens, count, row}, ds_of_chunk{for_slopes, tokens, count, row};
            float inverses[kChunk];
            const Matrix queries = transpose_rows(chunk_q, p.scale * kLog2E, for_queries);
            const Matrix grad_queries = transpose_rows(chunk_grad, 1.0f, for_grad_queries);
            start_scores(p, group, bias, first, count, weights);
            unit.product(keys, unit.right(queries, chunk_rooms[0]), weights, Accumulate::yes);
            powers(weights, inverses);
            unit.product(values, unit.right(grad_queries, chunk_rooms[0]), slopes, Accumulate::no);
            score_gradients(weights, slopes, inverses);
            unit.product(unit.left(unit.rows(p_of_chunk, scores_rooms)), unit.right(chunk_grad, chunk_rooms[1]), grad_v,
                         add);
            unit.product(unit.left(unit.rows(ds_of_chunk, scores_rooms)), unit.right(chunk_q, chunk_rooms[2]), grad_k,
                         add);
            unit.product(unit.left_transposed(ds_of_chunk, scores_rooms), right_keys, grad_q, Accumulate::no);
            scatter(group, first, grad_q, p.scale, map_of(0));
            if (grad_bias != nullptr) {
                add_bias_gradients(p, group, slopes, first, count, biases);
            }
        }
        scatter(group, 0, grad_k, p.scale, map_of(1));
        scatter(group, 0, grad_v, 1.0f, map_of(2));
        if (grad_bias != nullptr) {
            for (int64_t i = 0; i < bias_size(p); ++i) {
                grad_bias[i] += biases[i];
            }
        }
    }
}

void backward_any(const GridAttentionGradients& p, int64_t head, int64_t begin, int64_t end, float* scratch,
                  double* grad_bias) {
    with_types(p.dtype, p.brgemm, [&](auto type, const auto& unit) {
        backward<decltype(type)>(p, unit, head, begin, end, scratch, grad_bias);
    });
}

}  // namespace

constinit const GridAttentionKernels GridAttentionKernels::IPT_FAST_LEVEL = {cpu::forward_any, cpu::backward_any};

}  // namespace ipt_fast::cpu
