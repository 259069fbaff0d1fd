// The layers of attention on lattices and in windows, and their backwards: checks, work partition, registration. The
// arithmetic is in attention_layer_kernel.cpp.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "attention_layer_kernel.h"
#include "convolution.h"
#include "group_attention.h"
#include "layer_norm_2d.h"
#include "level.h"
#include "matrix_unit.h"
#include "packed.h"
#include "partition.h"
#include "work_space.h"

namespace ipt_fast::cpu {
namespace {

// The parameters of a layer but its attention's.
struct LayerArguments {
    OptionalTensor norm_weight, norm_bias;
    at::Tensor qkv_weight, project_weight;
    OptionalTensor qkv_bias, project_bias, gate;
    double eps;
    bool centered, residual;
};

void check_weights(const LayerArguments& a, const at::Tensor& like, int64_t channels) {
    check_tensor(a.qkv_weight, "qkv_weight", {3 * channels, channels, 1, 1}, like);
    check_tensor(a.project_weight, "project_weight", {channels, channels, 1, 1}, like);
}

// A block has several groups where these are small, but no more than there are for each thread.
int64_t groups_of_block(const AttentionLayerParams& p, int64_t threads) {
    constexpr int64_t kColumns = 64;
    const int64_t groups = p.queries.count(), most = std::max<int64_t>(kColumns / padded(p.queries.most()), 1);
    return std::clamp<int64_t>(groups * p.batch / threads, 1, most);
}

// The bias of the projection and, projected, that of v.
OptionalTensor result_bias(const LayerArguments& a) {
    const int64_t channels = a.project_weight.size(1);
    if (a.project_bias.has_value()) {
        check_tensor(*a.project_bias, "project_bias", {channels}, a.project_weight, true);
    }
    if (!a.qkv_bias.has_value()) {
        return a.project_bias;
    }
    check_tensor(*a.qkv_bias, "qkv_bias", {3 * channels}, a.project_weight, true);
    const at::Tensor of_v = a.qkv_bias->narrow(0, 2 * channels, channels).to(at::kDouble);
    const at::Tensor projected = a.project_weight.flatten(1).to(at::kDouble).mv(of_v);
    return a.project_bias.has_value() ? projected + *a.project_bias : projected;
}

// That of q. What the bias of k adds to the scores of a query is the same for all keys, and softmax takes it away,
// unless it is not finite: then k - k makes all of it NaN.
at::Tensor query_bias(const LayerArguments& a, int64_t channels) {
    if (!a.qkv_bias.has_value()) {
        return {};
    }
    const at::Tensor bias = a.qkv_bias->to(at::kFloat), of_k = bias.narrow(0, channels, channels);
    return bias.narrow(0, 0, channels) + (of_k - of_k);
}

struct PackedAttentionLayer : PackedHeader {
    AttentionShape shape;
    ScoreBiases of_scores;  // without values
    bool residual;
    int64_t weights;               // a piece
    int64_t score_biases, q_bias;  // pieces; 0: there are none
};

at::Tensor pack(Layer layer, const LayerArguments& a, const AttentionOptions& options) {
    const int64_t channels = input_channels(a.qkv_weight, "qkv_weight");
    check_weights(a, a.qkv_weight, channels);
    check_attention(options, a.qkv_weight, channels);
    const LayerNorm norm(a.qkv_weight, a.norm_weight, a.norm_bias, a.eps, a.centered);
    const LayerEpilogue epilogue(a.qkv_weight, result_bias(a), a.gate);
    const SpreadBiases biases(options, true);
    const at::Tensor q_bias = query_bias(a, channels);
    const at::Tensor qkv = a.qkv_weight.flatten(1).contiguous(), project = a.project_weight.flatten(1).contiguous();
    AttentionLayerParams p{};
    p.dtype = dtype_of(qkv);
    p.brgemm = brgemm_of(p.dtype);
    p.heads = options.num_heads;
    p.depth = channels / options.num_heads;
    p.qkv = qkv.const_data_ptr();
    p.project = project.const_data_ptr();

    const AttentionLayerKernels& kernel = kernels_in_use<AttentionLayerKernels>();
    Packing<PackedAttentionLayer> packing(layer, a.qkv_weight);
    PackedAttentionLayer& header = packing.header;
    header.shape = options;
    header.of_scores = biases.params;
    header.residual = a.residual;
    header.weights = packing.add(kernel.packed_size(p));
    header.score_biases = biases.values.defined() ? packing.add(biases.values) : 0;
    header.q_bias = q_bias.defined() ? packing.add(q_bias) : 0;
    packing.add(norm);
    packing.add(epilogue);
    packing.allocate();
    if (header.score_biases != 0) {
        packing.fill(header.score_biases, biases.values);
    }
    if (header.q_bias != 0) {
        packing.fill(header.q_bias, q_bias);
    }
    packing.fill(norm);
    packing.fill(epilogue);
    p.packed = packing.at<void>(header.weights);
    at::parallel_for(0, 4 * channels, 64, [&](int64_t begin, int64_t end) { kernel.pack(p, begin, end); });
    return packing.block;
}

at::Tensor run_packed(Layer layer, const at::Tensor& x, const at::Tensor& block, const OptionalTensor& norm_weight,
                      const OptionalTensor& norm_bias, const OptionalTensor& gate) {
    const Packed<PackedAttentionLayer> packed(block, layer, x);
    const PackedAttentionLayer& header = packed.header();
    const LayerNorm norm = norm_of(header, x, norm_weight, norm_bias);
    const LayerEpilogue epilogue = epilogue_of(header, x, gate);
    const at::Tensor map = channels_last(x);
    at::Tensor out = empty_channels_last(x.sizes(), x);
    AttentionLayerParams p{};
    set_groups(p, header.shape, x, x);
    p.bias = header.of_scores;
    p.bias.values = header.score_biases == 0 ? nullptr : packed.at<float>(header.score_biases);
    p.x = map.const_data_ptr();
    p.out = out.mutable_data_ptr();
    p.norm = norm.params;
    p.epilogue = epilogue.params;
    p.residual = header.residual;
    p.q_bias = header.q_bias == 0 ? nullptr : packed.at<float>(header.q_bias);
    p.packed = packed.at<void>(header.weights);
    p.block_groups = groups_of_block(p, at::get_num_threads());

    const AttentionLayerKernels& kernel = kernels_in_use<AttentionLayerKernels>();
    const int64_t floats = round_up(scratch_size(p), kChannelPad);
    WorkSpace space;
    const int64_t scratch = space.add(at::get_num_threads() * floats * static_cast<int64_t>(sizeof(float)));
    space.allocate();
    at::parallel_for(0, p.batch * blocks_of_image(p), 1, [&](int64_t begin, int64_t end) {
        const ProductScope scope{p.brgemm};
        kernel.forward(p, begin, end, space.at<float>(scratch) + at::get_thread_num() * floats);
    });
    return out;
}

at::Tensor run(Layer layer, const at::Tensor& x, LayerArguments a, const AttentionOptions& options) {
    check_image(x, "x");
    check_weights(a, x, x.size(1));
    const KeptLevel level;
    const OptionalTensor norm_weight = a.norm_weight, norm_bias = a.norm_bias, gate = a.gate;
    a.norm_weight = a.norm_bias = a.gate = std::nullopt;
    return run_packed(layer, x, pack(layer, a, options), norm_weight, norm_bias, gate);
}

using LayerGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                  at::Tensor, at::Tensor>;

// Recomputes the projections; attention and layer_norm_2d differentiate themselves.
LayerGradients backward(const at::Tensor& grad, const at::Tensor& x, const LayerArguments& a,
                        AttentionOptions options) {
    check_image(x, "x");
    check_weights(a, x, x.size(1));
    check_tensor(grad, "grad", x.sizes(), x);
    const at::Tensor map = channels_last(with_range(x)), grad_out = channels_last(with_range(grad));
    const at::Tensor norm_weight = wide(*a.norm_weight), qkv_weight = with_range(a.qkv_weight);
    const at::Tensor project_weight = with_range(a.project_weight);
    const OptionalTensor norm_bias = wide(a.norm_bias);
    options.bias = wide(options.bias);
    const at::Tensor normal = layer_norm_2d(map, norm_weight, norm_bias, a.eps, a.centered);
    const at::Tensor qkv = pointwise(normal, qkv_weight, a.qkv_bias);
    const auto [q, k, v] = parts_of(qkv);
    const ParameterGradients of_project =
        pointwise_gradients(grad_out, group_attention(q, k, v, options), project_weight, a.project_bias, a.gate);
    const AttentionGradients of_attention =
        group_attention_backward(pointwise_input_gradient(grad_out, project_weight, a.gate), q, k, v, options, true);
    const ParameterGradients of_qkv = pointwise_gradients(of_attention.qkv, normal, qkv_weight, a.qkv_bias);
    auto [grad_x, grad_norm_weight, grad_norm_bias] = layer_norm_2d_backward(
        pointwise_input_gradient(of_attention.qkv, qkv_weight), map, norm_weight, norm_bias, a.eps, a.centered);
    if (a.residual) {
        grad_x.add_(grad_out);
    }
    return {grad_x,      grad_norm_weight, grad_norm_bias, of_qkv.weight, of_project.weight, of_attention.bias,
            of_qkv.bias, of_project.bias,  of_project.gate};
}

// ---- the operators' own arguments ----------------------------------------------------------------------------------

AttentionOptions window_options(const OptionalTensor& bias, int64_t channels, int64_t num_heads, at::IntArrayRef window,
                                at::IntArrayRef shift, std::optional<double> scale) {
    TORCH_CHECK_VALUE(num_heads >= 1, "num_heads must be at least 1; got ", num_heads);
    const std::array<int64_t, 2> size{window[0], window[1]};
    const double of_scores = scale.value_or(1.0 / std::sqrt(static_cast<double>(channels / num_heads)));
    return {{false, num_heads, size, size, {shift[0], shift[1]}, of_scores}, bias, {}};
}

at::Tensor pack_grid_attention_layer(const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                     const at::Tensor& qkv_weight, const at::Tensor& project_weight,
                                     const OptionalTensor& bias_table, const OptionalTensor& qkv_bias,
                                     const OptionalTensor& project_bias, const OptionalTensor& gate, int64_t num_heads,
                                     int64_t grid_size, double eps, bool centered) {
    const int64_t channels = input_channels(qkv_weight, "qkv_weight");
    return pack(Layer::grid_attention_layer,
                {norm_weight, norm_bias, qkv_weight, project_weight, qkv_bias, project_bias, gate, eps, centered, true},
                lattice_options(bias_table, num_heads, grid_size, channels));
}

at::Tensor grid_attention_layer_packed(const at::Tensor& x, const at::Tensor& packed, const OptionalTensor& norm_weight,
                                       const OptionalTensor& norm_bias, const OptionalTensor& gate) {
    return run_packed(Layer::grid_attention_layer, x, packed, norm_weight, norm_bias, gate);
}

at::Tensor grid_attention_layer(const at::Tensor& x, const at::Tensor& norm_weight, const OptionalTensor& norm_bias,
                                const at::Tensor& qkv_weight, const at::Tensor& project_weight,
                                const OptionalTensor& bias_table, const OptionalTensor& qkv_bias,
                                const OptionalTensor& project_bias, const OptionalTensor& gate, int64_t num_heads,
                                int64_t grid_size, double eps, bool centered) {
    return run(Layer::grid_attention_layer, x,
               {norm_weight, norm_bias, qkv_weight, project_weight, qkv_bias, project_bias, gate, eps, centered, true},
               lattice_options(bias_table, num_heads, grid_size, x.size(1)));
}

LayerGradients grid_attention_layer_backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& norm_weight,
                                             const OptionalTensor& norm_bias, const at::Tensor& qkv_weight,
                                             const at::Tensor& project_weight, const OptionalTensor& bias_table,
                                             const OptionalTensor& qkv_bias, const OptionalTensor& project_bias,
                                             const OptionalTensor& gate, int64_t num_heads, int64_t grid_size,
                                             double eps, bool centered) {
    return backward(
        grad, x,
        {norm_weight, norm_bias, qkv_weight, project_weight, qkv_bias, project_bias, gate, eps, centered, true},
        lattice_options(bias_table, num_heads, grid_size, x.size(1)));
}

at::Tensor pack_window_attention_layer(const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                       const at::Tensor& qkv_weight, const at::Tensor& project_weight,
                                       const OptionalTensor& bias, const OptionalTensor& qkv_bias,
                                       const OptionalTensor& project_bias, const OptionalTensor& gate,
                                       int64_t num_heads, at::IntArrayRef window_size, at::IntArrayRef shift,
                                       std::optional<double> scale, double eps, bool centered, bool residual) {
    return pack(
        Layer::window_attention_layer,
        {norm_weight, norm_bias, qkv_weight, project_weight, qkv_bias, project_bias, gate, eps, centered, residual},
        window_options(bias, input_channels(qkv_weight, "qkv_weight"), num_heads, window_size, shift, scale));
}

at::Tensor window_attention_layer_packed(const at::Tensor& x, const at::Tensor& packed,
                                         const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                         const OptionalTensor& gate) {
    return run_packed(Layer::window_attention_layer, x, packed, norm_weight, norm_bias, gate);
}

at::Tensor window_attention_layer(const at::Tensor& x, const at::Tensor& norm_weight, const OptionalTensor& norm_bias,
                                  const at::Tensor& qkv_weight, const at::Tensor& project_weight,
                                  const OptionalTensor& bias, const OptionalTensor& qkv_bias,
                                  const OptionalTensor& project_bias, const OptionalTensor& gate, int64_t num_heads,
                                  at::IntArrayRef window_size, at::IntArrayRef shift, std::optional<double> scale,
                                  double eps, bool centered, bool residual) {
    return run(
        Layer::window_attention_layer, x,
        {norm_weight, norm_bias, qkv_weight, project_weight, qkv_bias, project_bias, gate, eps, centered, residual},
        window_options(bias, x.size(1), num_heads, window_size, shift, scale));
}

LayerGradients window_attention_layer_backward(const at::Tensor& grad, const at::Tensor& x,
                                               const at::Tensor& norm_weight, const OptionalTensor& norm_bias,
                                               const at::Tensor& qkv_weight, const at::Tensor& project_weight,
                                               const OptionalTensor& bias, const OptionalTensor& qkv_bias,
                                               const OptionalTensor& project_bias, const OptionalTensor& gate,
                                               int64_t num_heads, at::IntArrayRef window_size, at::IntArrayRef shift,
                                               std::optional<double> scale, double eps, bool centered, bool residual) {
    return backward(
        grad, x,
        {norm_weight, norm_bias, qkv_weight, project_weight, qkv_bias, project_bias, gate, eps, centered, residual},
        window_options(bias, x.size(1), num_heads, window_size, shift, scale));
}

}  // namespace

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("grid_attention_layer", grid_attention_layer);
    m.impl("pack_grid_attention_layer", pack_grid_attention_layer);
    m.impl("grid_attention_layer_packed", grid_attention_layer_packed);
    m.impl("grid_attention_layer_backward", grid_attention_layer_backward);
    m.impl("window_attention_layer", window_attention_layer);
    m.impl("pack_window_attention_layer", pack_window_attention_layer);
    m.impl("window_attention_layer_packed", window_attention_layer_packed);
    m.impl("window_attention_layer_backward", window_attention_layer_backward);
}

}  // namespace ipt_fast::cpu
