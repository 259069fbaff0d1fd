// The layer norm of layer_norm_2d.h for the translation unit's instruction set.
//
// A block of pixels is first laid out as fp32 rows, one pixel's channels each: converted from 16 bit, transposed from
// NCHW, or taken as it lies in memory. Reading x once and writing y once is all the traffic: 2 * sizeof(x) bytes and
// about 8 FLOP a value forward; 3 * sizeof(x) bytes and about 20 FLOP backward. Rows stay in the first or second cache.
#pragma once

#include "ipt_fast/layer_norm_2d.h"
#include "vec.h"

namespace ipt_fast {
namespace {

// A block of pixels: which image, the first pixel in it, and how many.
struct Block {
    int64_t image, first, count;

    Block(const LayerNorm2dParams& p, int64_t index) {
        const int64_t blocks = (p.pixels + kBlockPixels - 1) / kBlockPixels;
        image = index / blocks;
        first = index % blocks * kBlockPixels;
        count = p.pixels - first < kBlockPixels ? p.pixels - first : kBlockPixels;
    }
};

struct Rows {
    const float* data;
    int64_t stride;
};

template <typename T>
Rows load_channels_last(const T* in, int64_t count, int64_t channels, int64_t stride, float* scratch) {
    for (int64_t i = 0; i < count; ++i) {
        for (int64_t c = 0; c < stride; c += kLanes) {
            const int64_t left = channels - c;
            store(scratch + i * stride + c, left > 0 ? load(in + i * channels + c, left) : Vec{});
        }
    }
    return {scratch, stride};
}

template <typename T>
Rows load_planar(const T* in, int64_t count, int64_t channels, int64_t stride, int64_t pixels, float* scratch) {
    Vec tile[kLanes];
    for (int64_t c = 0; c < stride; c += kLanes) {
        for (int64_t i = 0; i < count; i += kLanes) {
            for (int64_t j = 0; j < kLanes; ++j) {
                tile[j] = c + j < channels ? load(in + (c + j) * pixels + i, count - i) : Vec{};
            }
            transpose(tile);
            for (int64_t j = 0; j < kLanes; ++j) {
                store(scratch + (i + j) * stride + c, tile[j]);  // scratch has all rows of the last tile
            }
        }
    }
    return {scratch, stride};
}

template <typename T>
Rows load_rows(const LayerNorm2dParams& p, const Map& map, const Block& block, float* scratch) {
    const T* image = static_cast<const T*>(map.data) + block.image * p.pixels * p.channels;
    if (!map.channels_last) {
        return load_planar(image + block.first, block.count, p.channels, p.padded_channels, p.pixels, scratch);
    }
    const T* first = image + block.first * p.channels;
    if constexpr (sizeof(T) == sizeof(float)) {
        if (p.channels == p.padded_channels) {
            return {first, p.channels};
        }
    }
    return load_channels_last(first, block.count, p.channels, p.padded_channels, scratch);
}

// Mean and 1 / sqrt(centred, biased variance + eps) of each row.
void statistics(const LayerNorm2dParams& p, const Rows& rows, int64_t count, float* mean, float* rstd) {
    const float channels = static_cast<float>(p.channels);
    const IntVec lane = lane_index();
    for (int64_t i = 0; i < count; ++i) {
        const float* row = rows.data + i * rows.stride;
        Vec sum{};
        for (int64_t c = 0; c < p.padded_channels; c += kLanes) {
            sum += load(row + c);
        }
        mean[i] = sum_lanes(sum) / channels;
        Vec squares{};
        const int64_t whole = p.channels / kLanes * kLanes;
        for (int64_t c = 0; c < whole; c += kLanes) {
            const Vec difference = load(row + c) - mean[i];
            squares += difference * difference;
        }
        if (whole < p.channels) {
            const Vec difference = load(row + whole) - mean[i];
            squares += lane < static_cast<int32_t>(p.channels - whole) ? difference * difference : Vec{};
        }
        rstd[i] = sum_lanes(squares) / channels + p.eps;
    }
    for (int64_t i = 0; i < count; ++i) {
        rstd[i] = 1.0f / __builtin_sqrtf(rstd[i]);
    }
}

template <typename T>
void forward(const LayerNorm2dParams& p, int64_t begin, int64_t end, float* scratch) {
    float mean[kBlockPixels], rstd[kBlockPixels];
    for (int64_t index = begin; index < end; ++index) {
        const Block block(p, index);
        const Rows x = load_rows<T>(p, p.x, block, scratch);
        statistics(p, x, block.count, mean, rstd);
        T* out = static_cast<T*>(p.out) + (block.image * p.pixels + block.first) * p.channels;
        for (int64_t i = 0; i < block.count; ++i) {
            const float* row = x.data + i * x.stride;
            const float origin = p.centered ? mean[i] : 0.0f;
            for (int64_t c = 0; c < p.channels; c += kLanes) {
                const Vec y = (load(row + c) - origin) * rstd[i] * load(p.weight + c) + load(p.bias + c);
                store(out + i * p.channels + c, y, p.channels - c);
            }
        }
    }
}

// With n = (x - mean) * rstd, or x * rstd if not centred, and h = weight * grad:
//   grad_x = rstd * (h - (x - mean) * rstd * mean(h * n) - mean(h) if centred), grad_weight = sum grad * n.
template <typename T>
void backward(const LayerNorm2dParams& p, int64_t begin, int64_t end, float* scratch, float* grad_weight,
              float* grad_bias) {
    float mean[kBlockPixels], rstd[kBlockPixels], mean_h[kBlockPixels], mean_hn[kBlockPixels], origin[kBlockPixels];
    const float channels = static_cast<float>(p.channels);
    for (int64_t index = begin; index < end; ++index) {
        const Block block(p, index);
        const Rows x = load_rows<T>(p, p.x, block, scratch);
        const Rows grad = load_rows<T>(p, p.grad, block, scratch + forward_scratch(p.padded_channels));
        statistics(p, x, block.count, mean, rstd);
        for (int64_t i = 0; i < block.count; ++i) {
            origin[i] = p.centered ? mean[i] : 0.0f;
            Vec sum_h{}, sum_hn{};
            for (int64_t c = 0; c < p.padded_channels; c += kLanes) {
                const Vec h = load(grad.data + i * grad.stride + c) * load(p.weight + c);
                sum_h += h;
                sum_hn += h * (load(x.data + i * x.stride + c) - origin[i]);
            }
            mean_h[i] = p.centered ? sum_lanes(sum_h) / channels : 0.0f;
            mean_hn[i] = sum_lanes(sum_hn) * rstd[i] / channels;
        }
        T* out = static_cast<T*>(p.out) + (block.image * p.pixels + block.first) * p.channels;
        for (int64_t c = 0; c < p.channels; c += kLanes) {
            const Vec weight = load(p.weight + c);
            Vec sum_g{}, sum_gn{};
            for (int64_t i = 0; i < block.count; ++i) {
                const Vec value = load(x.data + i * x.stride + c);
                const Vec g = load(grad.data + i * grad.stride + c);
                sum_g += g;
                sum_gn += g * ((value - origin[i]) * rstd[i]);
                const Vec dx = rstd[i] * (g * weight - (value - mean[i]) * rstd[i] * mean_hn[i] - mean_h[i]);
                store(out + i * p.channels + c, dx, p.channels - c);
            }
            store(grad_bias + c, load(grad_bias + c) + sum_g);
            store(grad_weight + c, load(grad_weight + c) + sum_gn);
        }
    }
}

void forward_any(const LayerNorm2dParams& p, int64_t begin, int64_t end, float* scratch) {
    switch (p.dtype) {
        case DType::f32:
            return forward<float>(p, begin, end, scratch);
        case DType::bf16:
            return forward<BFloat16>(p, begin, end, scratch);
        case DType::f16:
            return forward<Half>(p, begin, end, scratch);
    }
}

void backward_any(const LayerNorm2dParams& p, int64_t begin, int64_t end, float* scratch, float* grad_weight,
                  float* grad_bias) {
    switch (p.dtype) {
        case DType::f32:
            return backward<float>(p, begin, end, scratch, grad_weight, grad_bias);
        case DType::bf16:
            return backward<BFloat16>(p, begin, end, scratch, grad_weight, grad_bias);
        case DType::f16:
            return backward<Half>(p, begin, end, scratch, grad_weight, grad_bias);
    }
}

constexpr LayerNorm2dKernels layer_norm_2d_kernels = {forward_any, backward_any};

}  // namespace
}  // namespace ipt_fast
