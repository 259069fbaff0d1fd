// The forward of leffn and leffn_layer: checks, work partition, registration. The arithmetic is in leffn_kernel.cpp.
#include "leffn.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "leffn_kernel.h"
#include "level.h"
#include "matrix_unit.h"
#include "packed.h"
#include "partition.h"
#include "work_space.h"

namespace ipt_fast::cpu {
namespace {

// What the ring of hidden rows may take of a second cache of 1 MB, unless strips would become so narrow that the
// columns computed twice cost more.
constexpr int64_t kRingBytes = 600 << 10;
constexpr int64_t kStripColumns = 64;
constexpr int64_t kRowsPerStep = 4;
constexpr int64_t kGelu = 16;  // what the activation of a hidden value costs, in multiplications

// The weights as [padded hidden / kChannelPad][kernel * kernel][kChannelPad], fp32, padded with zeros.
at::Tensor packed_depthwise(const at::Tensor& weight) {
    const int64_t hidden = weight.size(0), taps = weight.size(2) * weight.size(3);
    const at::Tensor rows = at::zeros({padded(hidden), taps}, at::kFloat);
    rows.narrow(0, 0, hidden).copy_(weight.reshape({hidden, taps}));
    return rows.view({-1, kChannelPad, taps}).transpose(1, 2).contiguous();
}

// Strips so narrow that the ring fits, or narrower, and bands.
void partition(LeffnParams& p, int64_t batch, int64_t threads) {
    p.rows_per_step = kRowsPerStep;
    const auto ring_bytes = [&] {
        return padded(p.hidden) * p.slots() * (p.strip_width() + 2 * p.radius()) * int64_t(sizeof(float));
    };
    for (p.strips = 1; p.strip_width() > kStripColumns && ring_bytes() > kRingBytes;) {
        ++p.strips;
    }
    const double of_hidden = p.channels + kGelu, of_out = p.kernel * p.kernel + p.out_channels;
    Cheapest<std::pair<int64_t, int64_t>> cheapest;
    for_cuts(padded(p.width) / kChannelPad, p.strips, [&](int64_t strips) {
        p.strips = strips;
        const int64_t columns = std::min(p.strip_width(), p.width), beside = std::min<int64_t>(strips - 1, 2);
        for_cuts(p.height, 1, [&](int64_t bands) {
            const int64_t rows = (p.height + bands - 1) / bands, above = std::min<int64_t>(bands - 1, 2);
            const int64_t hidden = (rows + above * p.radius()) * (columns + beside * p.radius());
            const int64_t share = longest_share(batch * bands * strips, threads);
            cheapest.offer({bands, strips}, share * (hidden * of_hidden + rows * columns * of_out));
        });
    });
    std::tie(p.bands, p.strips) = cheapest.way();
}

struct PackedLeffn : PackedHeader {
    int64_t hidden, out_channels, kernel;
    int64_t expand, project, depthwise;  // pieces
    int64_t expand_bias;                 // 0: there is none
};

// `norm` is nullptr where there is none.
at::Tensor pack(Layer layer, const LayerNorm* norm, const LeffnWeights& w, const OptionalTensor& gate) {
    const at::Tensor taps = packed_depthwise(w.depthwise);
    const LayerEpilogue epilogue(w.project.transpose(0, 1), w.output_bias(), gate);
    LeffnParams p{};
    p.dtype = dtype_of(w.expand);
    p.channels = w.expand.size(1);
    p.hidden = w.expand.size(0);
    p.out_channels = w.project.size(0);
    p.expand = weight_of(w.expand);
    p.project = weight_of(w.project);
    p.brgemm = brgemm_of(p.dtype);
    Packing<PackedLeffn> packing(layer, w.expand);
    PackedLeffn& header = packing.header;
    header.hidden = p.hidden;
    header.out_channels = p.out_channels;
    header.kernel = w.depthwise.size(2);
    header.expand = packing.add(packed_floats(p, p.channels) * static_cast<int64_t>(sizeof(float)));
    header.project = packing.add(packed_floats(p, p.out_channels) * static_cast<int64_t>(sizeof(float)));
    header.depthwise = packing.add(taps);
    at::Tensor expand_bias;
    if (w.expand_bias.has_value()) {
        expand_bias = padded_parameter(w.expand_bias, padded(p.hidden));
        header.expand_bias = packing.add(expand_bias);
    }
    packing.add(epilogue);
    if (norm != nullptr) {
        packing.add(*norm);
    }
    packing.allocate();
    packing.fill(header.depthwise, taps);
    if (header.expand_bias != 0) {
        packing.fill(header.expand_bias, expand_bias);
    }
    packing.fill(epilogue);
    if (norm != nullptr) {
        packing.fill(*norm);
    }
    p.packed_expand = packing.at<void>(header.expand);
    p.packed_project = packing.at<void>(header.project);
    const LeffnKernels& kernel = kernels_in_use<LeffnKernels>();
    at::parallel_for(0, p.blocks(), 1, [&](int64_t begin, int64_t end) { kernel.pack(p, begin, end); });
    return packing.block;
}

at::Tensor run(Layer layer, const at::Tensor& x_, const Packed<PackedLeffn>& packed, const Norm& norm,
               const Epilogue& epilogue) {
    const PackedLeffn& header = packed.header();
    const at::Tensor x = channels_last(x_);
    const int64_t batch = x.size(0);
    at::Tensor out = empty_channels_last({batch, header.out_channels, x.size(2), x.size(3)}, x);
    LeffnParams p{};
    p.dtype = dtype_of(x);
    p.x = x.const_data_ptr();
    p.out = out.mutable_data_ptr();
    p.height = x.size(2);
    p.width = x.size(3);
    p.channels = x.size(1);
    p.hidden = header.hidden;
    p.out_channels = header.out_channels;
    p.kernel = header.kernel;
    p.norm = norm;
    p.epilogue = epilogue;
    p.residual = layer == Layer::leffn_layer;
    p.expand_bias = header.expand_bias == 0 ? nullptr : packed.at<float>(header.expand_bias);
    p.depthwise = packed.at<float>(header.depthwise);
    p.packed_expand = packed.at<void>(header.expand);
    p.packed_project = packed.at<void>(header.project);
    p.brgemm = brgemm_of(p.dtype);
    const int64_t threads = at::get_num_threads();
    partition(p, batch, threads);

    const LeffnKernels& kernel = kernels_in_use<LeffnKernels>();
    const int64_t scratch_size = round_up(kernel.scratch_size(p), 64);
    WorkSpace space;
    const int64_t scratch = space.add(threads * scratch_size);
    space.allocate();
    at::parallel_for(0, batch * p.bands * p.strips, 1, [&](int64_t begin, int64_t end) {
        const ProductScope scope{p.brgemm};
        kernel.forward(p, begin, end, space.at<char>(scratch) + at::get_thread_num() * scratch_size);
    });
    return out;
}

at::Tensor pack_layer(const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const LeffnWeights& w,
                      const OptionalTensor& gate, double eps, bool centered) {
    w.check();
    const LayerNorm norm(w.expand, norm_weight, norm_bias, eps, centered);
    TORCH_CHECK_VALUE(w.project.size(0) == w.expand.size(1), "project_weight must have the ", w.expand.size(1),
                      " output channels of x; got ", w.project.size(0));
    return pack(Layer::leffn_layer, &norm, w, gate);
}

at::Tensor pack_leffn(const at::Tensor& expand_weight, const at::Tensor& depthwise_weight,
                      const at::Tensor& project_weight, const OptionalTensor& expand_bias,
                      const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias) {
    const LeffnWeights w{expand_weight, depthwise_weight, project_weight, expand_bias, depthwise_bias, project_bias};
    w.check();
    return pack(Layer::leffn, nullptr, w, {});
}

at::Tensor pack_leffn_layer(const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                            const at::Tensor& expand_weight, const at::Tensor& depthwise_weight,
                            const at::Tensor& project_weight, const OptionalTensor& expand_bias,
                            const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias,
                            const OptionalTensor& gate, double eps, bool centered) {
    return pack_layer(norm_weight, norm_bias,
                      {expand_weight, depthwise_weight, project_weight, expand_bias, depthwise_bias, project_bias},
                      gate, eps, centered);
}

at::Tensor leffn_packed(const at::Tensor& x, const at::Tensor& packed_) {
    const Packed<PackedLeffn> packed(packed_, Layer::leffn, x);
    return run(Layer::leffn, x, packed, {}, epilogue_of(packed.header(), x, {}).params);
}

at::Tensor leffn_layer_packed(const at::Tensor& x, const at::Tensor& packed_, const OptionalTensor& norm_weight,
                              const OptionalTensor& norm_bias, const OptionalTensor& gate) {
    const Packed<PackedLeffn> packed(packed_, Layer::leffn_layer, x);
    const LayerNorm norm = norm_of(packed.header(), x, norm_weight, norm_bias);
    const LayerEpilogue epilogue = epilogue_of(packed.header(), x, gate);
    return run(Layer::leffn_layer, x, packed, norm.params, epilogue.params);
}

at::Tensor leffn(const at::Tensor& x, const at::Tensor& expand_weight, const at::Tensor& depthwise_weight,
                 const at::Tensor& project_weight, const OptionalTensor& expand_bias,
                 const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias) {
    const LeffnWeights w{expand_weight, depthwise_weight, project_weight, expand_bias, depthwise_bias, project_bias};
    w.check(x);
    const KeptLevel level;
    return leffn_packed(x, pack(Layer::leffn, nullptr, w, {}));
}

at::Tensor leffn_layer(const at::Tensor& x, const at::Tensor& norm_weight, const OptionalTensor& norm_bias,
                       const at::Tensor& expand_weight, const at::Tensor& depthwise_weight,
                       const at::Tensor& project_weight, const OptionalTensor& expand_bias,
                       const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias,
                       const OptionalTensor& gate, double eps, bool centered) {
    const LeffnWeights w{expand_weight, depthwise_weight, project_weight, expand_bias, depthwise_bias, project_bias};
    w.check(x);
    const KeptLevel level;
    return leffn_layer_packed(x, pack_layer({}, {}, w, {}, eps, centered), norm_weight, norm_bias, gate);
}

}  // namespace

// For tests: bands and strips of the forward.
TORCH_LIBRARY_FRAGMENT(ipt_fast_cpu, m) {
    m.def(
        "leffn_partition(int batch, int height, int width, int channels, int hidden, int out_channels, int kernel, int "
        "threads) -> (int, int)",
        [](int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t hidden, int64_t out_channels,
           int64_t kernel, int64_t threads) {
            LeffnParams p{};
            p.height = height;
            p.width = width;
            p.channels = channels;
            p.hidden = hidden;
            p.out_channels = out_channels;
            p.kernel = kernel;
            partition(p, batch, threads);
            return std::tuple(p.bands, p.strips);
        });
}

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("leffn", leffn);
    m.impl("leffn_layer", leffn_layer);
    m.impl("pack_leffn", pack_leffn);
    m.impl("pack_leffn_layer", pack_leffn_layer);
    m.impl("leffn_packed", leffn_packed);
    m.impl("leffn_layer_packed", leffn_layer_packed);
}

}  // namespace ipt_fast::cpu
