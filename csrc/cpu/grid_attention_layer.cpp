// The grid attention layer and its backward: checks, work partition, registration. The arithmetic is in
// grid_attention_layer_kernel.cpp.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "convolution.h"
#include "grid_attention.h"
#include "grid_attention_layer_kernel.h"
#include "layer_norm_2d.h"
#include "level.h"
#include "matrix_unit.h"
#include "packed.h"
#include "partition.h"
#include "work_space.h"

namespace ipt_fast::cpu {
namespace {

void check_layer(const at::Tensor& x, const at::Tensor& qkv_weight, const at::Tensor& project_weight) {
    check_image(x, "x");
    const int64_t channels = x.size(1);
    check_tensor(qkv_weight, "qkv_weight", {3 * channels, channels, 1, 1}, x);
    check_tensor(project_weight, "project_weight", {channels, channels, 1, 1}, x);
}

// Small weights stay in the caches while a group is computed; large ones should serve several groups, where there are
// enough for all threads.
void partition(GridAttentionLayerParams& p, int64_t threads) {
    constexpr int64_t kWeights = 16;  // what reading them costs beside the products of a token
    const int64_t groups = group_count(p.lattice), tokens = most_tokens(p.lattice);
    const int64_t most = std::max<int64_t>((channels_of(p) < 128 ? 64 : 256) / tokens, 1);
    Cheapest<int64_t> cheapest;
    for_cuts(groups, (groups + most - 1) / most, [&](int64_t blocks) {
        const int64_t size = (groups + blocks - 1) / blocks;
        cheapest.offer(size, longest_share(p.batch * blocks, threads) * (size * tokens + kWeights));
    });
    p.block_groups = cheapest.way();
}

// The bias of the projection and, projected, that of v.
OptionalTensor result_bias(const at::Tensor& project_weight, const OptionalTensor& qkv_bias,
                           const OptionalTensor& project_bias) {
    const int64_t channels = project_weight.size(1);
    if (project_bias.has_value()) {
        check_tensor(*project_bias, "project_bias", {channels}, project_weight, true);
    }
    if (!qkv_bias.has_value()) {
        return project_bias;
    }
    check_tensor(*qkv_bias, "qkv_bias", {3 * channels}, project_weight, true);
    const at::Tensor of_v = qkv_bias->narrow(0, 2 * channels, channels).to(at::kDouble);
    const at::Tensor projected = project_weight.flatten(1).to(at::kDouble).mv(of_v);
    return project_bias.has_value() ? projected + *project_bias : projected;
}

struct PackedGridAttentionLayer : PackedHeader {
    int64_t heads, grid;
    int64_t weights, table;  // pieces
    int64_t q_bias;          // a piece; 0: there is none
};

at::Tensor pack_grid_attention_layer(const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                     const at::Tensor& qkv_weight, const at::Tensor& project_weight,
                                     const OptionalTensor& bias_table, const OptionalTensor& qkv_bias,
                                     const OptionalTensor& project_bias, const OptionalTensor& gate, int64_t num_heads,
                                     int64_t grid_size, double eps, bool centered) {
    const int64_t channels = input_channels(qkv_weight, "qkv_weight");
    check_tensor(qkv_weight, "qkv_weight", {3 * channels, channels, 1, 1}, qkv_weight);
    check_tensor(project_weight, "project_weight", {channels, channels, 1, 1}, qkv_weight);
    check_attention(qkv_weight, channels, bias_table, num_heads, grid_size);
    const LayerNorm norm(qkv_weight, norm_weight, norm_bias, eps, centered);
    const LayerEpilogue epilogue(qkv_weight, result_bias(project_weight, qkv_bias, project_bias), gate);
    GridAttentionLayerParams p{};
    p.dtype = dtype_of(qkv_weight);
    p.brgemm = brgemm_of(p.dtype);
    p.lattice.grid = grid_size;
    p.heads = num_heads;
    p.depth = channels / num_heads;
    p.qkv = weight_of(qkv_weight);
    p.project = weight_of(project_weight);
    const at::Tensor bias = spread_biases(p, bias_table);
    const at::Tensor q_bias =
        qkv_bias.has_value()
            ? padded_parameter(qkv_bias->narrow(0, 0, channels).view({num_heads, p.depth}), padded(p.depth))
            : at::Tensor();
    const GridAttentionLayerKernels& kernel = kernels_in_use<GridAttentionLayerKernels>();
    Packing<PackedGridAttentionLayer> packing(Layer::grid_attention_layer, qkv_weight);
    PackedGridAttentionLayer& header = packing.header;
    header.heads = num_heads;
    header.grid = grid_size;
    header.weights = packing.add(kernel.packed_size(p));
    header.table = packing.add(bias);
    header.q_bias = q_bias.defined() ? packing.add(q_bias) : 0;
    packing.add(norm);
    packing.add(epilogue);
    packing.allocate();
    packing.fill(header.table, bias);
    if (header.q_bias != 0) {
        packing.fill(header.q_bias, q_bias);
    }
    packing.fill(norm);
    packing.fill(epilogue);
    p.packed = packing.at<void>(header.weights);
    at::parallel_for(0, 3 * num_heads + 1, 1, [&](int64_t begin, int64_t end) { kernel.pack(p, begin, end); });
    return packing.block;
}

at::Tensor grid_attention_layer_packed(const at::Tensor& x, const at::Tensor& packed_,
                                       const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                       const OptionalTensor& gate) {
    const Packed<PackedGridAttentionLayer> packed(packed_, Layer::grid_attention_layer, x);
    const PackedGridAttentionLayer& header = packed.header();
    const LayerNorm norm = norm_of(header, x, norm_weight, norm_bias);
    const LayerEpilogue epilogue = epilogue_of(header, x, gate);
    const at::Tensor map = channels_last(x);
    at::Tensor out = empty_channels_last(x.sizes(), x);
    GridAttentionLayerParams p{};
    set_lattice(p, x, x.size(1), header.heads, header.grid);
    p.bias = packed.at<float>(header.table);
    p.x = map.const_data_ptr();
    p.out = out.mutable_data_ptr();
    p.norm = norm.params;
    p.epilogue = epilogue.params;
    p.q_bias = header.q_bias == 0 ? nullptr : packed.at<float>(header.q_bias);
    p.packed = packed.at<void>(header.weights);
    partition(p, at::get_num_threads());

    const GridAttentionLayerKernels& kernel = kernels_in_use<GridAttentionLayerKernels>();
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

at::Tensor grid_attention_layer(const at::Tensor& x, const at::Tensor& norm_weight, const OptionalTensor& norm_bias,
                                const at::Tensor& qkv_weight, const at::Tensor& project_weight,
                                const OptionalTensor& bias_table, const OptionalTensor& qkv_bias,
                                const OptionalTensor& project_bias, const OptionalTensor& gate, int64_t num_heads,
                                int64_t grid_size, double eps, bool centered) {
    check_layer(x, qkv_weight, project_weight);
    const KeptLevel level;
    return grid_attention_layer_packed(
        x,
        pack_grid_attention_layer({}, {}, qkv_weight, project_weight, bias_table, qkv_bias, project_bias, {}, num_heads,
                                  finest_grid(x, bias_table, grid_size), eps, centered),
        norm_weight, norm_bias, gate);
}

using GridLayerGradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                                      at::Tensor, at::Tensor, at::Tensor>;

// Recomputes the projections; grid_attention and layer_norm_2d differentiate themselves.
GridLayerGradients grid_attention_layer_backward(const at::Tensor& grad, const at::Tensor& x,
                                                 const at::Tensor& norm_weight_, const OptionalTensor& norm_bias_,
                                                 const at::Tensor& qkv_weight_, const at::Tensor& project_weight_,
                                                 const OptionalTensor& bias_table_, const OptionalTensor& qkv_bias,
                                                 const OptionalTensor& project_bias, const OptionalTensor& gate,
                                                 int64_t num_heads, int64_t grid_size, double eps, bool centered) {
    check_layer(x, qkv_weight_, project_weight_);
    check_tensor(grad, "grad", x.sizes(), x);
    const at::Tensor map = channels_last(with_range(x)), grad_out = channels_last(with_range(grad));
    const at::Tensor norm_weight = wide(norm_weight_), qkv_weight = with_range(qkv_weight_);
    const at::Tensor project_weight = with_range(project_weight_);
    const OptionalTensor norm_bias = wide(norm_bias_), bias_table = wide(bias_table_);
    const at::Tensor normal = layer_norm_2d(map, norm_weight, norm_bias, eps, centered);
    const at::Tensor qkv = pointwise(normal, qkv_weight, qkv_bias);
    const ParameterGradients of_project = pointwise_gradients(
        grad_out, grid_attention(qkv, bias_table, num_heads, grid_size), project_weight, project_bias, gate);
    const auto [grad_qkv, grad_table] = grid_attention_backward(
        pointwise_input_gradient(grad_out, project_weight, gate), qkv, bias_table, num_heads, grid_size);
    const ParameterGradients of_qkv = pointwise_gradients(grad_qkv, normal, qkv_weight, qkv_bias);
    auto [grad_x, grad_norm_weight, grad_norm_bias] = layer_norm_2d_backward(
        pointwise_input_gradient(grad_qkv, qkv_weight), map, norm_weight, norm_bias, eps, centered);
    grad_x.add_(grad_out);
    return {grad_x,     grad_norm_weight, grad_norm_bias,  of_qkv.weight,  of_project.weight,
            grad_table, of_qkv.bias,      of_project.bias, of_project.gate};
}

}  // namespace

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("grid_attention_layer", grid_attention_layer);
    m.impl("pack_grid_attention_layer", pack_grid_attention_layer);
    m.impl("grid_attention_layer_packed", grid_attention_layer_packed);
    m.impl("grid_attention_layer_backward", grid_attention_layer_backward);
}

}  // namespace ipt_fast::cpu
