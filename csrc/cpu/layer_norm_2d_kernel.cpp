// The layer norm of layer_norm_2d_kernel.h at the level it is compiled for.
//
// A block of pixels is first laid out as fp32 rows, one pixel's channels each: converted from 16 bit, transposed from
// NCHW, or taken as it lies in memory. Reading x once and writing y once is all the traffic: 2 * sizeof(x) bytes and
// about 8 FLOP a value forward; 3 * sizeof(x) bytes and about 20 FLOP backward. Rows stay in the first or second cache.
#include "layer_norm_2d_kernel.h"

#include "matrix.h"
#include "vec.h"

namespace ipt_fast::cpu {
namespace {

// A block of pixels: which image, the first pixel in it, and how many.
struct PixelBlock {
    int64_t image, first, count;

    PixelBlock(const LayerNorm2dParams& p, int64_t index) {
        const int64_t blocks = (p.pixels + kBlockPixels - 1) / kBlockPixels;
        image = index / blocks;
        first = index % blocks * kBlockPixels;
        count = p.pixels - first < kBlockPixels ? p.pixels - first : kBlockPixels;
    }
};

template <typename T>
Matrix<const float> load_channels_last(const T* in, int64_t count, int64_t channels, int64_t stride, float* scratch) {
    for (int64_t i = 0; i < count; ++i) {
        float* row = scratch + i * stride;
        for_vectors(channels, [&](int64_t c, int64_t n) { store(row + c, load(in + i * channels + c, n)); });
        for (int64_t c = (channels + kLanes - 1) / kLanes * kLanes; c < stride; c += kLanes) {
            store(row + c, Vec{});
        }
    }
    return {scratch, count, channels, stride};
}

template <typename T>
Matrix<const float> load_planar(const T* in, int64_t count, int64_t channels, int64_t stride, int64_t pixels,
                                float* scratch) {
    for (int64_t c = 0; c < stride; c += kLanes) {
        for_vectors(count, [&](int64_t i, int64_t n) {
            Vec tile[kLanes];
            for (int64_t j = 0; j < kLanes; ++j) {
                tile[j] = c + j < channels ? load(in + (c + j) * pixels + i, n) : Vec{};
            }
            transpose(tile);
            for (int64_t j = 0; j < kLanes; ++j) {
                store(scratch + (i + j) * stride + c, tile[j]);  // scratch has the rows of a whole block
            }
        });
    }
    return {scratch, count, channels, stride};
}

template <typename T>
Matrix<const float> load_rows(const LayerNorm2dParams& p, const Map& map, const PixelBlock& block, float* scratch) {
    const T* image = static_cast<const T*>(map.data) + block.image * p.pixels * p.channels;
    if (!map.channels_last) {
        return load_planar(image + block.first, block.count, p.channels, p.padded_channels, p.pixels, scratch);
    }
    const T* first = image + block.first * p.channels;
    if constexpr (sizeof(T) == sizeof(float)) {
        if (p.channels == p.padded_channels) {
            return {first, block.count, p.channels, p.channels};
        }
    }
    return load_channels_last(first, block.count, p.channels, p.padded_channels, scratch);
}

// Of each pixel: the mean over its channels, the centred and biased variance + eps, and rstd = 1 / sqrt(variance).
// mean + rest is the mean to more than fp32's digits: x - mean - rest keeps them where x hardly varies.
struct Statistics {
    float mean[kBlockPixels], rest[kBlockPixels], variance[kBlockPixels], rstd[kBlockPixels];

    Statistics(const LayerNorm2dParams& p, Matrix<const float> rows) {
        const int64_t count = rows.rows;
        const float channels = static_cast<float>(p.channels);
        for (int64_t first = 0; first < count; first += kLanes) {
            const int64_t last = first + kLanes < count ? first + kLanes : count;
            Vec sums[kLanes]{}, squares[kLanes]{};
            for (int64_t i = first; i < last; ++i) {
                Vec sum{};
                for (int64_t c = 0; c < p.padded_channels; c += kLanes) {
                    sum += load(rows.row(i) + c);
                }
                sums[i - first] = sum;
            }
            store(mean + first, sum_each(sums) / channels);
            for (int64_t i = first; i < last; ++i) {
                Vec sum{}, square{};
                for_vectors(p.channels, [&](int64_t c, int64_t n) {
                    Vec difference = load(rows.row(i) + c) - mean[i];
                    if (n < kLanes) {
                        difference = lane_index() < static_cast<int32_t>(n) ? difference : Vec{};
                    }
                    sum += difference;
                    square += difference * difference;
                });
                sums[i - first] = sum;
                squares[i - first] = square;
            }
            const Vec excess = sum_each(sums) / channels, spread = sum_each(squares) / channels;
            const Vec infinite = broadcast(__builtin_inff());  // less another infinity is NaN
            const Vec variances = (spread == infinite ? spread : spread - excess * excess) + p.norm.eps;
            store(rest + first, excess);
            store(variance + first, variances);
            store(rstd + first, 1.0f / sqrt(variances));
        }
    }
};

template <typename T>
void forward(const LayerNorm2dParams& p, int64_t begin, int64_t end, float* scratch) {
    for (int64_t index = begin; index < end; ++index) {
        const PixelBlock block(p, index);
        const Norm norm = p.norm.of_image(block.image);
        const Matrix<const float> x = load_rows<T>(p, p.x, block, scratch);
        const Statistics s(p, x);
        T* out = static_cast<T*>(p.out) + (block.image * p.pixels + block.first) * p.channels;
        for (int64_t i = 0; i < block.count; ++i) {
            const float* row = x.row(i);
            const float mean = norm.centered ? s.mean[i] : 0.0f, rest = norm.centered ? s.rest[i] : 0.0f;
            const float rstd = s.rstd[i];
            for_vectors(p.channels, [&](int64_t c, int64_t n) {
                const Vec y = (load(row + c) - mean - rest) * rstd * load(norm.weight + c) + load(norm.bias + c);
                store(out + i * p.channels + c, y, n);
            });
        }
    }
}

inline void add(double* total, Vec v) {
    for (int j = 0; j < kLanes; ++j) {
        total[j] += v[j];
    }
}

// With d = x - mean, n = d or x (not centred), h = weight * grad, and means over the channels:
//   grad_x = rstd * (h - d * mean(h * n) / variance - mean(h) if centred), grad_weight = sum of grad * n * rstd.
template <typename T>
void backward(const LayerNorm2dParams& p, int64_t begin, int64_t end, float* scratch, double* grad_weight,
              double* grad_bias) {
    constexpr int64_t kRun = 8;  // pixels added up in fp32; a few short sums round less than one long one
    float mean_h[kBlockPixels], slope[kBlockPixels];
    const float channels = static_cast<float>(p.channels);
    const bool centered = p.norm.centered;
    for (int64_t index = begin; index < end; ++index) {
        const PixelBlock block(p, index);
        const Norm norm = p.norm.of_image(block.image);
        const Matrix<const float> x = load_rows<T>(p, p.x, block, scratch);
        const Matrix<const float> grad = load_rows<T>(p, p.grad, block, scratch + forward_scratch(p.padded_channels));
        const Statistics s(p, x);
        for (int64_t first = 0; first < block.count; first += kLanes) {
            const int64_t last = first + kLanes < block.count ? first + kLanes : block.count;
            Vec sums_h[kLanes]{}, sums_hn[kLanes]{};
            for (int64_t i = first; i < last; ++i) {
                const float mean = centered ? s.mean[i] : 0.0f, rest = centered ? s.rest[i] : 0.0f;
                Vec sum_h{}, sum_hn{};
                for (int64_t c = 0; c < p.padded_channels; c += kLanes) {
                    const Vec h = load(grad.row(i) + c) * load(norm.weight + c);
                    sum_h += h;
                    sum_hn += h * (load(x.row(i) + c) - mean - rest);
                }
                sums_h[i - first] = sum_h;
                sums_hn[i - first] = sum_hn;
            }
            store(mean_h + first, centered ? sum_each(sums_h) / channels : Vec{});
            store(slope + first, sum_each(sums_hn) / channels / load(s.variance + first));
        }
        T* out = static_cast<T*>(p.out) + (block.image * p.pixels + block.first) * p.channels;
        for_vectors(p.channels, [&](int64_t c, int64_t count) {
            const Vec weight = load(norm.weight + c);
            Vec total_g{}, total_gn{};
            for (int64_t run = 0; run < block.count; run += kRun) {
                const int64_t stop = run + kRun < block.count ? run + kRun : block.count;
                Vec sum_g{}, sum_gn{};
                for (int64_t i = run; i < stop; ++i) {
                    const Vec value = load(x.row(i) + c);
                    const Vec g = load(grad.row(i) + c);
                    const Vec d = value - s.mean[i] - s.rest[i];
                    sum_g += g;
                    sum_gn += g * ((centered ? d : value) * s.rstd[i]);
                    const Vec dx = s.rstd[i] * (g * weight - mean_h[i] - d * slope[i]);
                    store(out + i * p.channels + c, dx, count);
                }
                total_g += sum_g;
                total_gn += sum_gn;
            }
            add(grad_bias + c, total_g);
            add(grad_weight + c, total_gn);
        });
    }
}

void forward_any(const LayerNorm2dParams& p, int64_t begin, int64_t end, float* scratch) {
    with_type(p.dtype, [&](auto type) { forward<decltype(type)>(p, begin, end, scratch); });
}

void backward_any(const LayerNorm2dParams& p, int64_t begin, int64_t end, float* scratch, double* grad_weight,
                  double* grad_bias) {
    with_type(p.dtype, [&](auto type) { backward<decltype(type)>(p, begin, end, scratch, grad_weight, grad_bias); });
}

}  // namespace

constinit const LayerNorm2dKernels LayerNorm2dKernels::IPT_FAST_LEVEL = {cpu::forward_any, cpu::backward_any};

}  // namespace ipt_fast::cpu
