// The gradient of attention inside groups of pixels, at the level it is compiled for.
//
// Per group and head, in chunks of queries: the weights P are computed again, dV += P^T dO, dP = dO V^T, dS = P (dP -
// rowsum(P dP)), dQ = scale dS K, dK += scale dS^T Q. All of it runs on gathered rows, a token each, in the first and
// second cache; the maps and the gradient are read once and the results are written once: 7 * channels values a pixel,
// 10 * keys * channels FLOP. dS is added to its places among the biases after every chunk, in fp32 within a group and
// in fp64 over the groups.
#include "group_attend.h"

namespace ipt_fast::cpu {
namespace {

// out = the transpose of in * factor, its rows with zeros up to padded(in.rows). Returns a view of it.
Matrix<float> transpose_rows(Matrix<const float> in, float factor, float* out) {
    const int64_t rows = in.rows, columns = in.columns, row = in.stride, out_row = padded(rows);
    for (int64_t i = 0; i < out_row; i += kLanes) {
        for (int64_t c = 0; c < columns; c += kLanes) {
            Vec tile[kLanes];
#pragma GCC unroll 16
            for (int64_t j = 0; j < kLanes; ++j) {
                tile[j] = i + j < rows ? load(in.data + (i + j) * row + c) * factor : Vec{};
            }
            transpose(tile);
#pragma GCC unroll 16
            for (int64_t j = 0; j < kLanes; ++j) {
                store(out + (c + j) * out_row + i, tile[j]);
            }
        }
    }
    return {out, columns, out_row, out_row};
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
// Neighbours in a row of keys may have biases that overlap, so the next key is the one in the next row.
void add_bias_gradients(const ScoreBiases& biases, const GroupPair& g, Matrix<const float> gradients, int64_t first,
                        int64_t count, float* sums) {
    const int64_t rows = g.keys.rows.count, columns = g.keys.columns.count, row = gradients.stride;
    for_pieces(g.queries.columns.count, first, count, [&](int64_t a, int64_t b, int64_t start, int64_t piece) {
        float* const of_piece = sums + g.first_bias + a * biases.query_row + b;
        for (int64_t c = 0; c < piece; c += kLanes) {
            const IntVec valid = lane_index() < static_cast<int32_t>(piece - c);
            for (int64_t key_b = 0; key_b < columns; ++key_b) {
                const float* source = gradients.row(key_b) + start + c;
                float* target = of_piece + c + key_b * biases.key_column;
                for (int64_t key_a = 0; key_a < rows; ++key_a, source += columns * row, target += biases.key_row) {
                    store(target, load(target) + (valid ? load(source) : Vec{}));
                }
            }
        }
    });
}

// The pixels of a list as rows, zeros for those beyond the border; and rows, times a factor, to their pixels.
template <typename T>
void gather(const ListedPixels<const T>& pixels, Matrix<float> rows) {
    for (int64_t i = 0; i < pixels.count; ++i) {
        if (pixels.list[i] == kNoPixel) {
            memset(rows.row(i), 0, padded(rows.columns) * sizeof(float));
        } else {
            const int64_t channels = rows.columns;
            load_rows(Matrix{pixels.map + pixels.list[i] * pixels.step, 1, channels, channels}, rows.slice(i, 1));
        }
    }
}

template <typename T>
void scatter(Matrix<const float> rows, float factor, const ListedPixels<T>& pixels) {
    for (int64_t i = 0; i < pixels.count; ++i) {
        T* const target = pixels.map + pixels.list[i] * pixels.step;
        for_vectors(rows.columns, [&](int64_t c, int64_t n) { store(target + c, load(rows.row(i) + c) * factor, n); });
    }
}

constexpr float kLeastLength = 1e-12f;

// Each row divided by its length, or by the least one; the inverses of what they were divided by.
void normalize(Matrix<float> rows, float* inverses) {
    for (int64_t i = 0; i < rows.rows; ++i) {
        Vec squares{};
        for (int64_t c = 0; c < rows.columns; c += kLanes) {
            squares += load(rows.row(i) + c) * load(rows.row(i) + c);
        }
        const float length = __builtin_sqrtf(sum(squares));
        inverses[i] = 1.0f / (length < kLeastLength ? kLeastLength : length);
        for (int64_t c = 0; c < rows.columns; c += kLanes) {
            store(rows.row(i) + c, load(rows.row(i) + c) * inverses[i]);
        }
    }
}

// From the gradients of normalised rows those of the rows. Returns the sum of their products. The length of a row that
// was divided by the least one does not count, and so takes no part of the gradient away.
double normalize_backward(Matrix<const float> rows, const float* inverses, float factor, Matrix<float> gradients) {
    double total = 0;
    for (int64_t i = 0; i < rows.rows; ++i) {
        Vec products{};
        for (int64_t c = 0; c < rows.columns; c += kLanes) {
            products += load(rows.row(i) + c) * load(gradients.row(i) + c);
        }
        const float product = sum(products), scale = inverses[i] * factor;
        const float along = inverses[i] < 1.0f / kLeastLength ? product : 0.0f;
        total += product;
        for (int64_t c = 0; c < rows.columns; c += kLanes) {
            float* const gradient = gradients.row(i) + c;
            store(gradient, (load(gradient) - load(rows.row(i) + c) * along) * scale);
        }
    }
    return total;
}

template <typename T, typename Unit>
void backward(const GroupAttentionGradients& p, const Unit& unit, int64_t begin, int64_t end, float* memory,
              GroupAttentionSums sums) {
    const int64_t channels = channels_of(p), depth = p.depth, row = padded(depth);
    const bool cosine = p.temperature != nullptr;
    ScratchStack scratch{memory};
    const auto take_list = [&](const TokenGroups& groups) {
        return reinterpret_cast<int64_t*>(scratch.take(list_size(groups)));
    };
    int64_t *const query_list = take_list(p.queries), *const key_list = take_list(p.keys);
    const auto take_rows = [&](int64_t count) { return Matrix{scratch.take(padded(count) * row), count, depth, row}; };
    const int64_t most_queries = p.queries.most(), most_keys = p.keys.most();
    const Matrix<float> all_q = take_rows(most_queries), all_grad = take_rows(most_queries);
    const Matrix<float> all_k = take_rows(most_keys), all_v = take_rows(most_keys);
    const Matrix<float> all_grad_k = take_rows(most_keys), all_grad_v = take_rows(most_keys);
    float *const q_inverses = scratch.take(padded(most_queries)), *const k_inverses = scratch.take(padded(most_keys));
    float *const for_queries = scratch.take(chunk_size(p)), *const for_grad_queries = scratch.take(chunk_size(p));
    const Matrix chunk_grad_q{scratch.take(chunk_size(p)), kChunk, depth, row};
    float *const for_weights = scratch.take(scores_size(p)), *const for_slopes = scratch.take(scores_size(p));
    float* const biases = scratch.take(p.bias.size);
    float* const rooms[] = {scratch.take(keys_size(p)), scratch.take(keys_size(p)), scratch.take(keys_size(p))};
    float* const chunk_rooms[] = {scratch.take(chunk_size(p)), scratch.take(chunk_size(p)),
                                  scratch.take(chunk_size(p))};
    float* const scores_rooms = scratch.take(scores_room(p));
    // The heads of a group follow each other, as their channels share cache lines.
    for (int64_t item = begin * p.heads; item < end * p.heads; ++item) {
        const int64_t index = item / p.heads, head = item % p.heads;
        const float scale = cosine ? p.temperature[head] : p.scale;
        double grad_temperature = 0;
        const GroupPair g(p, index);
        const int64_t image = g.image(p), queries = g.queries.tokens(), keys = g.keys.tokens();
        list_pixels(p.queries, g.queries, query_list);
        list_pixels(p.keys, g.keys, key_list);
        const Matrix q = all_q.slice(0, queries), grad = all_grad.slice(0, queries);
        const Matrix k = all_k.slice(0, keys), v = all_v.slice(0, keys);
        const Matrix grad_k = all_grad_k.slice(0, keys), grad_v = all_grad_v.slice(0, keys);
        const int64_t query_pixels = image * p.queries.pixels(), key_pixels = image * p.keys.pixels();
        const auto pixels_of_head = [&](const Pixels& map, int64_t origin, const int64_t* list, int64_t count) {
            const T* const first = static_cast<const T*>(map.data) + origin * map.stride + head * depth;
            return ListedPixels<const T>{first, map.stride, list, count};
        };
        gather(pixels_of_head(p.q, query_pixels, query_list, queries), q);
        gather(pixels_of_head(p.grad, query_pixels, query_list, queries), grad);
        gather(pixels_of_head(p.k, key_pixels, key_list, keys), k);
        gather(pixels_of_head(p.v, key_pixels, key_list, keys), v);
        if (cosine) {
            normalize(q, q_inverses);
            normalize(k, k_inverses);
        }
        const auto left_keys = unit.left(unit.rows(k, rooms[0])), left_values = unit.left(unit.rows(v, rooms[1]));
        const auto right_keys = unit.right(k, rooms[2]);
        memset(biases, 0, p.bias.size * sizeof(float));
        for (int64_t first = 0; first < queries; first += kChunk) {
            const int64_t count = queries - first < kChunk ? queries - first : kChunk, columns = padded(count);
            const Accumulate add = first > 0 ? Accumulate::yes : Accumulate::no;
            const Matrix chunk_q = q.slice(first, count), chunk_grad = grad.slice(first, count);
            const Matrix grad_q = chunk_grad_q.slice(0, count);
            const Matrix weights{for_weights, keys, columns, columns}, slopes{for_slopes, keys, columns, columns};
            // the same without the padding, as P and dS
            const Matrix p_of_chunk{for_weights, keys, count, columns}, ds_of_chunk{for_slopes, keys, count, columns};
            ColumnSoftmax softmax(columns);
            const Matrix right_queries = transpose_rows(chunk_q, scale * kLog2E, for_queries);
            const Matrix right_grad = transpose_rows(chunk_grad, 1.0f, for_grad_queries);
            const Accumulate to_biases = start_scores(p, g, head, first, count, 0, weights);
            unit.product(left_keys, unit.right(right_queries, chunk_rooms[0]), weights, to_biases);
            softmax.take_powers(weights, NoBiases{});
            softmax.invert();
            unit.product(left_values, unit.right(right_grad, chunk_rooms[0]), slopes, Accumulate::no);
            score_gradients(weights, slopes, softmax.sums);
            unit.product(unit.left(unit.rows(p_of_chunk, scores_rooms)), unit.right(chunk_grad, chunk_rooms[1]), grad_v,
                         add);
            unit.product(unit.left(unit.rows(ds_of_chunk, scores_rooms)), unit.right(chunk_q, chunk_rooms[2]), grad_k,
                         add);
            unit.product(unit.left_transposed(ds_of_chunk, scores_rooms), right_keys, grad_q, Accumulate::no);
            float factor = scale;
            if (cosine) {
                grad_temperature += normalize_backward(chunk_q, q_inverses + first, scale, grad_q);
                factor = 1.0f;
            }
            T* const target = static_cast<T*>(p.grad_q) + query_pixels * p.grad_step + head * depth;
            scatter(grad_q, factor, ListedPixels<T>{target, p.grad_step, query_list + first, count});
            if (sums.bias != nullptr) {
                add_bias_gradients(p.bias, g, slopes, first, count, biases);
            }
        }
        float factor = scale;
        if (cosine) {
            normalize_backward(k, k_inverses, scale, grad_k);
            factor = 1.0f;
        }
        if (p.of_windows) {
            float* const target_k = static_cast<float*>(p.grad_k) + index * keys * channels + head * depth;
            float* const target_v = static_cast<float*>(p.grad_v) + index * keys * channels + head * depth;
            for (int64_t i = 0; i < keys; ++i) {
                key_list[i] = i;
            }
            scatter(grad_k, factor, ListedPixels<float>{target_k, channels, key_list, keys});
            scatter(grad_v, 1.0f, ListedPixels<float>{target_v, channels, key_list, keys});
        } else {
            const int64_t origin = key_pixels * p.grad_step + head * depth;
            scatter(grad_k, factor, ListedPixels<T>{static_cast<T*>(p.grad_k) + origin, p.grad_step, key_list, keys});
            scatter(grad_v, 1.0f, ListedPixels<T>{static_cast<T*>(p.grad_v) + origin, p.grad_step, key_list, keys});
        }
        if (sums.bias != nullptr) {
            double* const of_head = sums.bias + head * p.bias.size;
            for (int64_t i = 0; i < p.bias.size; ++i) {
                of_head[i] += biases[i];
            }
        }
        sums.temperature[head] += grad_temperature;
    }
}

void backward_any(const GroupAttentionGradients& p, int64_t begin, int64_t end, float* scratch,
                  GroupAttentionSums sums) {
    with_types(p.dtype, p.brgemm,
               [&](auto type, const auto& unit) { backward<decltype(type)>(p, unit, begin, end, scratch, sums); });
}

}  // namespace

constinit const GroupAttentionBackwardKernels GroupAttentionBackwardKernels::IPT_FAST_LEVEL = {cpu::backward_any};

}  // namespace ipt_fast::cpu
