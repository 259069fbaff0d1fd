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

template <typename T>
void forward(const GridAttentionParams& p, int64_t begin, int64_t end, float* memory) {
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

// From the powers of the scores (weights, with the inverses of their columns' sums) and dP (slopes), both
// [rows][columns]: P and dS in their places. kLanes divides columns.
void score_gradients(float* weights, float* slopes, int64_t rows, int64_t columns, const float* inverses) {
    for (int64_t c = 0; c < columns; c += kLanes) {
        float *weight = weights + c, *slope = slopes + c;
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
void add_bias_gradients(const GridAttention& p, const Group& g, const float* gradients, int64_t first, int64_t count,
                        float* bias) {
    const int64_t rows = g.rows, columns = g.columns, row = padded(count);
    const int64_t last = p.lattice.grid - 1, step = bias_row(p);
    for_pieces(g, first, count, [=](int64_t a, int64_t b, int64_t start, int64_t piece) {
        for (int64_t c = 0; c < piece; c += kLanes) {
            const IntVec valid = lane_index() < static_cast<int32_t>(piece - c);
            for (int64_t key_b = 0; key_b < columns; ++key_b) {
                const float* source = gradients + key_b * row + start + c;
                float* target = bias + (a + last) * step + last + b - key_b + c;
                for (int64_t key_a = 0; key_a < rows; ++key_a, source += columns * row, target -= step) {
                    store(target, load(target) + (valid ? load(source) : Vec{}));
                }
            }
        }
    });
}

// `count` rows of a group from token `first` on, times a factor, to a map of `pixel` values a pixel.
template <typename T>
void scatter(const Group& g, int64_t first, int64_t count, const float* rows, int64_t row, int64_t channels,
             float factor, T* map, int64_t pixel) {
    for_pixels(g, first, count, [=](int64_t token, int64_t index) {
        for_vectors(channels, [=](int64_t c, int64_t n) {
            store(map + index * pixel + c, load(rows + (token - first) * row + c) * factor, n);
        });
    });
}

template <typename T>
void backward(const GridAttentionGradients& p, int64_t head, int64_t begin, int64_t end, float* memory,
              double* grad_bias) {
    const int64_t channels = channels_of(p), depth = padded(p.depth), groups = group_count(p.lattice);
    const int64_t pixels = p.lattice.height * p.lattice.width;
    const float* bias = p.bias + head * bias_size(p);
    ScratchStack scratch{memory};
    float* rows[3];
    for (float*& piece : rows) {
        piece = scratch.take(head_size(p));
    }
    const auto& [q, k, v] = rows;
    float* grad_rows = scratch.take(head_size(p));
    float* grad_k = scratch.take(head_size(p));
    float* grad_v = scratch.take(head_size(p));
    float* queries = scratch.take(chunk_size(p));
    float* grad_queries = scratch.take(chunk_size(p));
    float* grad_q = scratch.take(chunk_size(p));
    float* weights = scratch.take(scores_size(p));
    float* slopes = scratch.take(scores_size(p));
    float* biases = scratch.take(bias_size(p));
    for (int64_t item = begin; item < end; ++item) {
        const int64_t image = item / groups;
        const Group group = group_of(p.lattice, item % groups);
        const int64_t tokens = group.tokens();
        const int64_t origin = image * pixels * channels + head * p.depth,
                      origin3 = origin + 2 * image * pixels * channels;
        for (int64_t i = 0; i < 3; ++i) {
            gather(group, static_cast<const T*>(p.qkv) + origin3 + i * channels, 3 * channels, p.depth, rows[i], depth);
        }
        gather(group, static_cast<const T*>(p.grad) + origin, channels, p.depth, grad_rows, depth);
        T* out = static_cast<T*>(p.grad_qkv) + origin3;
        memset(biases, 0, bias_size(p) * sizeof(float));
        for (int64_t first = 0; first < tokens; first += kChunk) {
            const int64_t count = tokens - first < kChunk ? tokens - first : kChunk, row = padded(count);
            const float *chunk_q = q + first * depth, *chunk_grad = grad_rows + first * depth;
            float inverses[kChunk];
            transpose_rows(chunk_q, count, p.depth, p.scale * kLog2E, queries);
            transpose_rows(chunk_grad, count, p.depth, 1.0f, grad_queries);
            start_scores(p, group, bias, first, count, weights);
            product(tokens, row, p.depth, k, depth, queries, row, weights, row, true);
            powers(weights, tokens, row, inverses);
            product(tokens, row, p.depth, v, depth, grad_queries, row, slopes, row, false);
            score_gradients(weights, slopes, tokens, row, inverses);
            product(tokens, p.depth, count, weights, row, chunk_grad, depth, grad_v, depth, first > 0);
            product(tokens, p.depth, count, slopes, row, chunk_q, depth, grad_k, depth, first > 0);
            product_transposed(count, p.depth, tokens, slopes, row, k, depth, grad_q, depth, false);
            scatter(group, first, count, grad_q, depth, p.depth, p.scale, out, 3 * channels);
            if (grad_bias != nullptr) {
                add_bias_gradients(p, group, slopes, first, count, biases);
            }
        }
        scatter(group, 0, tokens, grad_k, depth, p.depth, p.scale, out + channels, 3 * channels);
        scatter(group, 0, tokens, grad_v, depth, p.depth, 1.0f, out + 2 * channels, 3 * channels);
        if (grad_bias != nullptr) {
            for (int64_t i = 0; i < bias_size(p); ++i) {
                grad_bias[i] += biases[i];
            }
        }
    }
}

void backward_any(const GridAttentionGradients& p, int64_t head, int64_t begin, int64_t end, float* scratch,
                  double* grad_bias) {
    with_type(p.dtype, [&](auto type) { backward<decltype(type)>(p, head, begin, end, scratch, grad_bias); });
}

}  // namespace

constinit const GridAttentionKernels GridAttentionKernels::IPT_FAST_LEVEL = {cpu::forward_any, cpu::backward_any};

}  // namespace ipt_fast::cpu
