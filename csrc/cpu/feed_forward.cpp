// Feed-forward networks: checks, work partition, packed weights. The arithmetic is in feed_forward_kernel.cpp.
#include "feed_forward.h"

#include <ATen/Parallel.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "level.h"
#include "matrix_unit.h"
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

struct NamedForm {
    std::string_view name;
    Form form;
};

constexpr NamedForm kForms[] = {
    {"mlp", {true, false, Tail::convolved}}, {"leffn", kLeffn},
    {"leff", {true, true, Tail::activated}}, {"mix", {false, true, Tail::activated}},
    {"conv_ffn", {true, true, Tail::added}}, {"gdfn", {false, true, Tail::activated_gate}},
    {"sgfn", {true, true, Tail::gate}},
};

Form form_of(std::string_view name) {
    for (const NamedForm& known : kForms) {
        if (name == known.name) {
            return known.form;
        }
    }
    TORCH_CHECK_VALUE(false, "form must be mlp, leffn, leff, mix, conv_ffn, gdfn or sgfn; got ", name);
}

// The weights as [padded hidden / kChannelPad][kernel * kernel][kChannelPad], fp32, padded with zeros.
at::Tensor packed_depthwise(const at::Tensor& weight, int64_t halves) {
    const at::Tensor rows = padded_halves(wide(weight), halves);
    return rows.view({-1, kChannelPad, weight.size(2) * weight.size(3)}).transpose(1, 2).contiguous();
}

// Strips so narrow that the ring fits, or narrower, and bands.
void partition(FeedForwardParams& p, int64_t batch, int64_t threads) {
    if (!p.form.convolves) {
        p.width *= std::exchange(p.height, 1);
        p.rows_per_step = p.bands = 1;
        p.strips = (p.width + kPixels - 1) / kPixels;
        return;
    }
    p.rows_per_step = kRowsPerStep;
    const int64_t halves = p.form.halves();
    const auto ring_bytes = [&] {
        return halves * padded(p.hidden) * p.slots() * (p.strip_width() + 2 * p.radius()) * int64_t(sizeof(float));
    };
    for (p.strips = 1; p.strip_width() > kStripColumns && ring_bytes() > kRingBytes;) {
        ++p.strips;
    }
    const double of_hidden = static_cast<double>(halves * (p.channels + (p.form.activates ? kGelu : 0)));
    const double of_tail = p.form.tail == Tail::convolved || p.form.tail == Tail::gate ? 0.0 : kGelu;
    const double of_out = p.form.convolved_halves() * p.kernel * p.kernel + of_tail + p.out_channels;
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

}  // namespace

at::Tensor padded_halves(const at::Tensor& values, int64_t halves) {
    const int64_t size = values.size(0) / halves;
    at::DimVector shape(values.sizes());
    shape[0] = halves * padded(size);
    at::Tensor out = at::zeros(shape, values.options());
    for (int64_t half = 0; half < halves; ++half) {
        out.narrow(0, half * padded(size), size).copy_(values.narrow(0, half * size, size));
    }
    return out;
}

at::Tensor unpadded_halves(const at::Tensor& values, int64_t size, int64_t halves) {
    at::DimVector shape(values.sizes());
    shape[0] = halves * size;
    return values.unflatten(0, {halves, padded(size)}).narrow(1, 0, size).reshape(shape);
}

void FeedForwardWeights::check() const {
    const int64_t channels = input_channels(expand, "expand_weight"), halves = form.halves();
    TORCH_CHECK_VALUE(expand.size(0) % halves == 0, "expand_weight must have an even number of outputs; got ",
                      expand.size(0));
    TORCH_CHECK_VALUE(project.dim() == 4 && project.size(0) > 0, "project_weight must be (N, M, 1, 1); got shape ",
                      project.sizes());
    TORCH_CHECK_VALUE(depthwise.dim() == 4 && depthwise.size(2) % 2 == 1,
                      "depthwise_weight must be (M, 1, K, K) with odd K; got shape ", depthwise.sizes());
    const int64_t all = expand.size(0), convolved = hidden() * form.convolved_halves(), kernel = depthwise.size(2);
    check_tensor(expand, "expand_weight", {all, channels, 1, 1}, expand);
    check_tensor(depthwise, "depthwise_weight", {convolved, 1, kernel, kernel}, expand);
    check_tensor(project, "project_weight", {project.size(0), hidden(), 1, 1}, expand);
    const auto check_small = [&](const OptionalTensor& values, const char* name, int64_t size) {
        if (values.has_value()) {
            check_tensor(*values, name, {size}, expand, true);
        }
    };
    check_small(expand_bias, "expand_bias", all);
    check_small(depthwise_bias, "depthwise_bias", convolved);
    check_small(project_bias, "project_bias", project.size(0));
    check_small(inner_weight, "inner_weight", hidden());
    check_small(inner_bias, "inner_bias", hidden());
    TORCH_CHECK_VALUE(inner_weight.has_value() == (form.tail == Tail::gate),
                      "inner_weight must be given for sgfn and only there");
}

void FeedForwardWeights::check(const at::Tensor& x) const {
    check_image(x, "x");
    check();
    check_tensor(expand, "expand_weight", {expand.size(0), x.size(1), 1, 1}, x);
}

OptionalTensor FeedForwardWeights::output_bias() const {
    if (!depthwise_bias.has_value() || form.tail != Tail::convolved) {
        return wide(project_bias);
    }
    const at::Tensor projected = at::mv(wide(project).flatten(1), wide(*depthwise_bias));
    return project_bias.has_value() ? projected.add(wide(*project_bias)) : projected;
}

void add_output_biases(FeedForwardGradients& gradients, const at::Tensor& sums, const FeedForwardWeights& w,
                       const OptionalTensor& gate) {
    const at::Tensor grad_bias = (gate.has_value() ? sums.mul(*gate) : sums).sum(0).to(at::kFloat);
    if (w.project_bias.has_value()) {
        gradients.project_bias = grad_bias;
    }
    if (w.depthwise_bias.has_value() && w.form.tail == Tail::convolved) {
        gradients.depthwise_bias = at::mv(wide(w.project).flatten(1).t(), grad_bias);
        gradients.project.flatten(1).add_(grad_bias.outer(wide(*w.depthwise_bias)));
    }
    const OptionalTensor bias = w.output_bias();
    if (gate.has_value() && bias.has_value()) {
        const at::Tensor of_images = sums.mul(*bias);
        gradients.gate.add_(gate->dim() == 1 ? of_images.sum(0) : of_images);
    }
}

FeedForwardWeights weights_of_form(std::string_view name, const at::Tensor& expand, const OptionalTensor& depthwise,
                                   const at::Tensor& project, const OptionalTensor& expand_bias,
                                   const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias,
                                   const OptionalTensor& inner_weight, const OptionalTensor& inner_bias,
                                   double inner_eps) {
    const Form form = form_of(name);
    TORCH_CHECK_VALUE(form.convolves == depthwise.has_value(), "depthwise_weight must be ",
                      form.convolves ? "given" : "None", " for ", name);
    const at::Tensor taps = form.convolves ? *depthwise : at::ones({expand.size(0), 1, 1, 1}, expand.options());
    return {expand,       taps, project,      expand_bias, depthwise_bias,
            project_bias, form, inner_weight, inner_bias,  inner_eps};
}

at::Tensor pack(Layer layer, const LayerNorm* norm, const FeedForwardWeights& w, const OptionalTensor& gate) {
    const Form form = w.form;
    const at::Tensor taps = packed_depthwise(w.depthwise, form.convolved_halves());
    const LayerEpilogue epilogue(w.project.transpose(0, 1), w.output_bias(), gate);
    FeedForwardParams p{};
    p.dtype = dtype_of(w.expand);
    p.form = form;
    p.channels = w.expand.size(1);
    p.hidden = w.hidden();
    p.out_channels = w.project.size(0);
    p.expand = weight_of(w.expand);
    p.project = weight_of(w.project);
    p.brgemm = brgemm_of(p.dtype);
    Packing<PackedFeedForward> packing(layer, w.expand);
    PackedFeedForward& header = packing.header;
    header.form = form;
    header.hidden = p.hidden;
    header.out_channels = p.out_channels;
    header.kernel = w.depthwise.size(2);
    header.inner_eps = static_cast<float>(w.inner_eps);
    const int64_t size_of_float = sizeof(float);
    header.expand = packing.add(form.halves() * p.blocks() * p.expand_floats() * size_of_float);
    header.project = packing.add(p.blocks() * p.project_floats() * size_of_float);
    std::vector<std::pair<int64_t, at::Tensor>> pieces;
    const auto add = [&](const at::Tensor& values) {
        pieces.emplace_back(packing.add(values), values);
        return pieces.back().first;
    };
    header.depthwise = add(taps);
    if (w.expand_bias.has_value()) {
        header.expand_bias = add(padded_halves(wide(*w.expand_bias), form.halves()));
    }
    if (form.tail != Tail::convolved) {
        const int64_t convolved = w.depthwise.size(0);
        const at::Tensor bias = w.depthwise_bias.has_value() ? *w.depthwise_bias : at::zeros({convolved}, at::kFloat);
        header.depthwise_bias = add(padded_halves(wide(bias), form.convolved_halves()));
    }
    if (w.inner_weight.has_value()) {
        header.inner_weight = add(padded_parameter(w.inner_weight, padded(p.hidden)));
        header.inner_bias = add(padded_parameter(w.inner_bias, padded(p.hidden)));
    }
    packing.add(epilogue);
    if (norm != nullptr) {
        packing.add(*norm);
    }
    packing.allocate();
    for (const auto& [offset, values] : pieces) {
        packing.fill(offset, values);
    }
    packing.fill(epilogue);
    if (norm != nullptr) {
        packing.fill(*norm);
    }
    p.packed_expand = packing.at<void>(header.expand);
    p.packed_project = packing.at<void>(header.project);
    const FeedForwardKernels& kernel = kernels_in_use<FeedForwardKernels>();
    at::parallel_for(0, p.blocks(), 1, [&](int64_t begin, int64_t end) { kernel.pack(p, begin, end); });
    return packing.block;
}

at::Tensor pack_layer(Layer layer, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                      const FeedForwardWeights& w, const OptionalTensor& gate, double eps, bool centered) {
    w.check();
    const LayerNorm norm(w.expand, norm_weight, norm_bias, eps, centered);
    TORCH_CHECK_VALUE(w.project.size(0) == w.expand.size(1), "project_weight must have the ", w.expand.size(1),
                      " output channels of x; got ", w.project.size(0));
    return pack(layer, &norm, w, gate);
}

at::Tensor run(Layer layer, const at::Tensor& x_, const Packed<PackedFeedForward>& packed, const Norm& norm,
               const Epilogue& epilogue) {
    const PackedFeedForward& header = packed.header();
    const at::Tensor x = channels_last(x_);
    const int64_t batch = x.size(0);
    at::Tensor out = empty_channels_last({batch, header.out_channels, x.size(2), x.size(3)}, x);
    const auto piece = [&](int64_t offset) { return offset == 0 ? nullptr : packed.at<float>(offset); };
    FeedForwardParams p{};
    p.dtype = dtype_of(x);
    p.x = x.const_data_ptr();
    p.out = out.mutable_data_ptr();
    p.height = x.size(2);
    p.width = x.size(3);
    p.channels = x.size(1);
    p.hidden = header.hidden;
    p.out_channels = header.out_channels;
    p.kernel = header.kernel;
    p.form = header.form;
    p.norm = norm;
    p.inner_norm = {piece(header.inner_weight), piece(header.inner_bias), header.inner_eps, true, 0, 0};
    p.epilogue = epilogue;
    p.residual = layer != Layer::leffn;
    p.expand_bias = piece(header.expand_bias);
    p.depthwise = piece(header.depthwise);
    p.depthwise_bias = piece(header.depthwise_bias);
    p.packed_expand = packed.at<void>(header.expand);
    p.packed_project = packed.at<void>(header.project);
    p.brgemm = brgemm_of(p.dtype);
    const int64_t threads = at::get_num_threads();
    partition(p, batch, threads);

    const FeedForwardKernels& kernel = kernels_in_use<FeedForwardKernels>();
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

at::Tensor run_layer(Layer layer, const at::Tensor& x, const at::Tensor& packed_, const OptionalTensor& norm_weight,
                     const OptionalTensor& norm_bias, const OptionalTensor& gate) {
    const Packed<PackedFeedForward> packed(packed_, layer, x);
    const LayerNorm norm = norm_of(packed.header(), x, norm_weight, norm_bias);
    const LayerEpilogue epilogue = epilogue_of(packed.header(), x, gate);
    return run(layer, x, packed, norm.params, epilogue.params);
}

// For tests: bands and strips of the forward of leffn.
TORCH_LIBRARY_FRAGMENT(ipt_fast_cpu, m) {
    m.def(
        "leffn_partition(int batch, int height, int width, int channels, int hidden, int out_channels, int kernel, int "
        "threads) -> (int, int)",
        [](int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t hidden, int64_t out_channels,
           int64_t kernel, int64_t threads) {
            FeedForwardParams p{};
            p.form = kLeffn;
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

}  // namespace ipt_fast::cpu
