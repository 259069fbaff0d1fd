// The backward of PW(DW(GELU(PW(x)))), what is its own.
//
// With a = gelu(h) and b = depthwise a: ga = depthwise^T gb, gh = ga * gelu'(h),
// grad_depthwise[t] = sum of gb[p] * a[p + t].
//
// FLOPs of a pixel: 2 * hidden * (3 * channels + 2 * out_channels + 3 * kernel^2), and the first `channels` and
// `out_channels` again for the halo, 20 % of a tile of 32 by 64 inside an image (kernel 5).
#pragma once

#include "gelu.h"
#include "sweep.h"

namespace ipt_fast::cpu {
namespace {

struct Leffn {
    // a, gelu'(h) and gb.
    enum Ring { activation, slope, upstream };

    template <typename Sweep>
    static void fill_rings(Sweep& s, int64_t row) {
        const bool inside = s.near_rows.begin <= row && row < s.near_rows.end;
        const Range filled = inside ? s.near_columns : Range(0, 0);
        s.clear_beside(s.ring(activation), row, filled);
        s.clear_beside(s.ring(upstream), row, filled);
        if (!inside) {
            return;
        }
        const int64_t first = s.staged(row, filled.begin), count = filled.size();
        const auto in_ring = [&](Ring ring, int64_t m) { return s.ring(ring) + s.in_ring(row, m, filled.begin); };
        const Matrix<const float> hidden = s.expand(first, count);
        for (int64_t m = 0; m < s.width; m += kLanes) {
            float *const a = in_ring(activation, m), *const slopes = in_ring(slope, m);
            with_bias(s.p.expand_bias, s.first_channel + m, [&](const auto& add) __attribute__((always_inline)) {
                for (int64_t i = 0; i < count; ++i) {
                    Vec value, slope_value;
                    gelu_with_slope(add(load(hidden.row(i) + m)), value, slope_value);
                    store(a + i * kLanes, value);
                    store(slopes + i * kLanes, slope_value);
                }
            });
        }
        const Matrix<const float> gradients = s.upstream_of(first, count);
        for (int64_t m = 0; m < s.width; m += kLanes) {
            float* const target = in_ring(upstream, m);
            for (int64_t i = 0; i < count; ++i) {
                store(target + i * kLanes, load(gradients.row(i) + m));
            }
        }
    }

    template <typename Sweep>
    static void convolve(Sweep& s, const Range& band) {
        const int64_t count = s.columns.size();
        for (int64_t m = 0; m < s.width; m += kLanes) {
            s.add_taps(0, m, [&](float* taps) {
                for (int64_t row = band.begin; row < band.end; ++row) {
                    const int64_t first = (row - band.begin) * count, centre = s.in_ring(row, m, s.columns.begin);
                    const Rows<float> b{s.projected + first * s.layout.half_pitch + m, s.layout.half_pitch};
                    const Rows<float> gh{s.grad_hidden + first * s.layout.pitch + m, s.layout.pitch};
                    const float* const slopes = s.ring(slope) + centre;
                    const InputRows around = s.rows_around(s.ring(activation), row, s.columns.begin, m);
                    convolve_row<Sweep::kFixed>(around, count, s.kernel(), s.taps_of(s.p.depthwise, 0, m),
                                                [=](int64_t i, Vec sum) { store(b.row(i), sum); });
                    add_tap_gradients<Sweep::kFixed>(s.ring(upstream) + centre, around.rows, count, s.kernel(), taps);
                    convolve_row<Sweep::kFixed>(s.rows_around(s.ring(upstream), row, s.columns.begin, m), count,
                                                s.kernel(), s.taps_of(s.p.flipped, 0, m), [=](int64_t i, Vec sum) {
                                                    store(gh.row(i), sum * load(slopes + i * kLanes));
                                                });
                }
            });
        }
    }
};

}  // namespace
}  // namespace ipt_fast::cpu
