// The backward of PW(GELU(c1) * c2), where c1 and c2 are the halves of c = DW(PW(x)), what is its own.
//
// With b = gelu(c1) * c2: gc1 = gb * c2 * gelu'(c1), gc2 = gb * gelu(c1), gh = depthwise^T gc,
// grad_depthwise[t] = sum of gc[p] * h[p + t]; the gradient of a bias of the convolution is the sum of gc.
//
// FLOPs of a pixel, with two times `hidden` channels: 2 * hidden * (6 * channels + 2 * out_channels + 6 * kernel^2),
// and for the halo the first 2 * channels, out_channels and 2 * kernel^2 again: 10 % to 20 % of a tile of 32 by 64
// inside an image (kernel 3).
#pragma once

#include "gelu.h"
#include "sweep.h"

namespace ipt_fast::cpu {
namespace {

struct Gdfn {
    // The halves of h and of gc, and b.
    enum Ring { hidden = 0, grad_convolved = 2, product = 4 };

    // h of the row, and what then follows for the row in its reach.
    template <typename Sweep>
    static void fill_rings(Sweep& s, int64_t row) {
        expand(s, row);
        if (row >= s.rows.begin) {
            convolve_row_of(s, row - s.reach);
        }
    }

    // b and gh are copied to a band, where they are multiplied.
    template <typename Sweep>
    static void convolve(Sweep& s, const Range& band) {
        const int64_t count = s.columns.size();
        for_vectors_of_halves(s, [&](int64_t half, int64_t m) {
            Vec sum{};
            s.add_taps(half, m, [&](float* taps) {
                for (int64_t row = band.begin; row < band.end; ++row) {
                    const int64_t first = (row - band.begin) * count;
                    const Rows<float> gh{s.grad_hidden + first * s.layout.pitch + half * s.width + m, s.layout.pitch};
                    const float* const gradients = s.ring(grad_convolved + half);
                    const float* const centre = gradients + s.in_ring(row, m, s.columns.begin);
                    add_tap_gradients<Sweep::kFixed>(centre,
                                                     s.rows_around(s.ring(hidden + half), row, s.columns.begin, m).rows,
                                                     count, s.kernel(), taps);
                    sum += sum_rows({centre, kLanes}, count);
                    convolve_row<Sweep::kFixed>(s.rows_around(gradients, row, s.columns.begin, m), count, s.kernel(),
                                                s.taps_of(s.p.flipped, half, m),
                                                [=](int64_t i, Vec value) { store(gh.row(i), value); });
                }
            });
            if (s.p.grad_depthwise_bias != nullptr) {
                float* const total = s.p.grad_depthwise_bias + s.share_channel(half) + m;
                store(total, load(total) + sum);
            }
        });
        for (int64_t row = band.begin; row < band.end; ++row) {
            for (int64_t m = 0; m < s.width; m += kLanes) {
                const float* const products = s.ring(product) + s.in_ring(row, m, s.columns.begin);
                float* const b = s.projected + (row - band.begin) * count * s.layout.half_pitch + m;
                for (int64_t i = 0; i < count; ++i) {
                    store(b + i * s.layout.half_pitch, load(products + i * kLanes));
                }
            }
        }
    }

  private:
    template <typename Sweep, typename Body>
    static void for_vectors_of_halves(const Sweep& s, const Body& body) {
        for (int64_t half = 0; half < 2; ++half) {
            for (int64_t m = 0; m < s.width; m += kLanes) {
                body(half, m);
            }
        }
    }

    template <typename Sweep>
    static void expand(Sweep& s, int64_t row) {
        const bool inside = s.near_rows.begin <= row && row < s.near_rows.end;
        const Range filled = inside ? s.near_columns : Range(0, 0);
        s.clear_beside(s.ring(hidden), row, filled);
        s.clear_beside(s.ring(hidden + 1), row, filled);
        if (!inside) {
            return;
        }
        const Matrix<const float> values = s.expand(s.staged(row, filled.begin), filled.size());
        for_vectors_of_halves(s, [&](int64_t half, int64_t m) {
            const float* const source = values.data + half * s.width + m;
            float* const target = s.ring(hidden + half) + s.in_ring(row, m, filled.begin);
            with_bias(s.p.expand_bias, half * s.p.hidden + s.first_channel + m, [&](const auto& add) {
                for (int64_t i = 0; i < filled.size(); ++i) {
                    store(target + i * kLanes, add(load(source + i * values.stride)));
                }
            });
        });
    }

    // b and gc of a row in reach of the tile.
    template <typename Sweep>
    static void convolve_row_of(Sweep& s, int64_t row) {
        const Range rows = s.rows.wider(s.reach, s.p.height), columns = s.columns.wider(s.reach, s.p.width);
        const bool inside = rows.begin <= row && row < rows.end;
        const Range filled = inside ? columns : Range(0, 0);
        s.clear_beside(s.ring(grad_convolved), row, filled);
        s.clear_beside(s.ring(grad_convolved + 1), row, filled);
        if (!inside) {
            return;
        }
        const int64_t count = filled.size();
        const Matrix<const float> upstream = s.upstream_of(s.staged(row, filled.begin), count);
        for (int64_t m = 0; m < s.width; m += kLanes) {
            float* convolved[2];
            for (int64_t half = 0; half < 2; ++half) {
                float* const sums = convolved[half] = s.ring(grad_convolved + half) + s.in_ring(row, m, filled.begin);
                with_bias(s.p.depthwise_bias, half * s.p.hidden + s.first_channel + m, [&](const auto& add) {
                    convolve_row<Sweep::kFixed>(s.rows_around(s.ring(hidden + half), row, filled.begin, m), count,
                                                s.kernel(), s.taps_of(s.p.depthwise, half, m),
                                                [=](int64_t i, Vec sum) { store(sums + i * kLanes, add(sum)); });
                });
            }
            float* const b = s.ring(product) + s.in_ring(row, m, filled.begin);
            for (int64_t i = 0; i < count; ++i) {
                float *const first = convolved[0] + i * kLanes, *const second = convolved[1] + i * kLanes;
                const Vec gb = load(upstream.row(i) + m), gated = load(second);
                Vec value, slope;
                gelu_with_slope(load(first), value, slope);
                store(b + i * kLanes, value * gated);
                store(first, gb * gated * slope);
                store(second, gb * value);
            }
        }
    }
};

}  // namespace
}  // namespace ipt_fast::cpu
