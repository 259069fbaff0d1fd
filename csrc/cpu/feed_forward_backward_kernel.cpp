// The kernels of feed_forward_backward_kernel.h at the level it is compiled for.
#include "feed_forward_backward_kernel.h"

#include "gdfn_sweep.h"
#include "leffn_sweep.h"

namespace ipt_fast::cpu {
namespace {

template <typename Network, typename T, typename Unit>
void run(const FeedForwardBackwardParams& p, const Unit& unit, int64_t share, int64_t group, float* scratch) {
    switch (p.kernel) {
        case 3:
            return Sweep<Network, T, Unit, 3>(p, unit, share, group, scratch).run();
        case 5:
            return Sweep<Network, T, Unit, 5>(p, unit, share, group, scratch).run();
        default:
            return Sweep<Network, T, Unit, 0>(p, unit, share, group, scratch).run();
    }
}

void run_any(const FeedForwardBackwardParams& p, int64_t share, int64_t group, float* scratch) {
    with_types(p.dtype, p.brgemm, [&](auto type, const auto& unit) {
        p.halves == 1 ? run<Leffn, decltype(type)>(p, unit, share, group, scratch)
                      : run<Gdfn, decltype(type)>(p, unit, share, group, scratch);
    });
}

void pack(const FeedForwardBackwardParams& p, int64_t chunk) {
    const int64_t first = p.chunks.first(chunk) * kChannelPad, last = p.chunks.first(chunk + 1) * kChannelPad;
    const int64_t width = last - first, channels = padded(p.channels);
    with_types(p.dtype, p.brgemm, [&](auto, const auto& unit) {
        for (int64_t half = 0; half < p.halves; ++half) {
            const float* const expand = p.expand + (half * p.hidden + first) * channels;
            const int64_t piece = chunk * p.halves + half;
            unit.template pack<float>({expand, width, p.channels, channels, 1},
                                      p.packed_expand + piece * p.expand_floats());
            unit.template pack<float>({expand, p.channels, width, 1, channels},
                                      p.packed_transposed + piece * p.transposed_floats());
        }
        unit.template pack<float>({p.project + first, width, p.out_channels, 1, p.hidden},
                                  p.packed_project + chunk * p.project_floats());
    });
}

}  // namespace

constinit const FeedForwardBackwardKernels FeedForwardBackwardKernels::IPT_FAST_LEVEL = {cpu::pack, cpu::run_any};

}  // namespace ipt_fast::cpu
