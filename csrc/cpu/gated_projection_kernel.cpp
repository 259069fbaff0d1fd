// The gated projection of gated_projection_kernel.h at the level it is compiled for. A block's sum is made where its
// product reads it: both maps are read once, out is written once. 2 * channels * columns FLOPs a pixel.
#include "gated_projection_kernel.h"

#include "rows.h"
#include "units.h"

namespace ipt_fast::cpu {
namespace {

// channel gate * x + pixel gate * other, of pixels from `first` on.
template <typename T, typename Value>
void mix_rows(const GatedProjectionParams& p, int64_t first, Matrix<Value> out) {
    for (int64_t i = 0; i < out.rows; ++i) {
        const int64_t pixel = first + i;
        const T* const x = static_cast<const T*>(p.x.data) + pixel * p.x.stride;
        const T* const other = static_cast<const T*>(p.other.data) + pixel * p.other.stride;
        const float* const gate = p.channel_gate + pixel / p.image_pixels * p.gate_stride;
        const Vec of_pixel = broadcast(load(static_cast<const T*>(p.pixel_gate) + pixel, 1)[0]);
        int64_t c = 0;
        for (; c + kLanes <= p.channels; c += kLanes) {
            store(out.row(i) + c, fma(of_pixel, load(other + c), load(gate + c) * load(x + c)));
        }
        for (; c < padded(p.channels); c += kLanes) {
            const int64_t n = p.channels - c;
            store(out.row(i) + c, n > 0 ? fma(of_pixel, load(other + c, n), load(gate + c) * load(x + c, n)) : Vec{});
        }
    }
}

template <typename T, typename Unit>
void forward(const GatedProjectionParams& p, const Unit& unit, int64_t begin, int64_t end, float* scratch) {
    float* const products = scratch;
    auto* const staged = reinterpret_cast<typename Unit::Value*>(scratch + kGatedBlock * padded(p.columns));
    for (int64_t block = begin; block < end; ++block) {
        const int64_t first = block * kGatedBlock;
        const int64_t count = p.pixels - first < kGatedBlock ? p.pixels - first : kGatedBlock;
        const Matrix left{staged, count, p.channels, padded(p.channels)};
        const Matrix result{products, count, p.columns, padded(p.columns)};
        mix_rows<T>(p, first, left);
        fill_rows(p.bias, result);
        unit.multiply(left, p.packed, result, Accumulate::yes);
        const T* const residual = static_cast<const T*>(p.residual);
        store_rows(result, residual ? residual + first * p.columns : nullptr,
                   static_cast<T*>(p.out) + first * p.columns);
    }
}

void forward_any(const GatedProjectionParams& p, int64_t begin, int64_t end, float* scratch) {
    with_types(p.dtype, p.brgemm,
               [&](auto type, const auto& unit) { forward<decltype(type)>(p, unit, begin, end, scratch); });
}

}  // namespace

constinit const GatedProjectionKernels GatedProjectionKernels::IPT_FAST_LEVEL = {cpu::forward_any};

}  // namespace ipt_fast::cpu
