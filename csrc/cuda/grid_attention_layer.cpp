#include "grid_attention_layer.cuh"

#include "bindings.cuh"

namespace ipt_fast::cuda {
namespace {

Tensor run_grid_attention_layer(Tensor x, Tensor norm_weight, OptionalTensor norm_bias, Tensor qkv_weight,
                                Tensor project_weight, OptionalTensor bias_table, int64_t num_heads, int64_t grid_size,
                                double eps, bool centered, bool tf32) {
    check_image(x, "x");
    const int64_t channels = x.size(1), height = x.size(2), width = x.size(3);
    STD_TORCH_CHECK(channels == 32 || channels == 48 || channels == 64 || channels == 96,
                    "x must have 32, 48, 64 or 96 channels; got ", channels);
    STD_TORCH_CHECK(num_heads > 0 && (num_heads * 32 == channels || num_heads * 48 == channels),
                    "num_heads must make heads of 32 or 48 channels of ", channels, "; got ", num_heads);
    STD_TORCH_CHECK(grid_size > 0, "grid_size must be at least 1; got ", grid_size);
    check_small(norm_weight, "norm_weight", {channels}, x, norm_weight);
    check_tensor(qkv_weight, "qkv_weight", {3 * channels, channels, 1, 1}, x);
    check_tensor(project_weight, "project_weight", {channels, channels, 1, 1}, x);
    if (norm_bias.has_value()) {
        check_small(*norm_bias, "norm_bias", {channels}, x, norm_weight);
    }
    if (bias_table.has_value()) {
        const int64_t side = 2 * grid_size - 1;
        check_small(*bias_table, "bias_table", {side * side, num_heads}, x, norm_weight);
    }
    const Lattices lattices = lattices_of(height, width, grid_size);
    const int64_t groups = x.size(0) * lattices.cubby_rows * lattices.cubby_columns;
    STD_TORCH_CHECK(lattices.rows <= kMostLatticePoints && lattices.columns <= kMostLatticePoints,
                    "grid_size must be at most ", kMostLatticePoints, "; got ", grid_size);
    STD_TORCH_CHECK(height <= INT32_MAX / 2 && width <= INT32_MAX / 2 && groups <= INT32_MAX / 4,
                    "x must fit one launch; got ", x.size(0), " images of ", height, " x ", width);
    check_device({&x, &norm_weight, &qkv_weight, &project_weight, norm_bias.has_value() ? &*norm_bias : &x,
                  bias_table.has_value() ? &*bias_table : &x});

    Tensor out = new_image(x, channels);
    GridAttentionLayerArguments arguments = {};
    arguments.x = x.data_ptr();
    arguments.qkv_weight = qkv_weight.data_ptr();
    arguments.project_weight = project_weight.data_ptr();
    arguments.norm_weight = norm_weight.data_ptr();
    arguments.norm_bias = values(norm_bias);
    arguments.table = values(bias_table);
    arguments.narrow = norm_weight.scalar_type() != ScalarType::Float;
    arguments.out = out.data_ptr();
    arguments.lattices = lattices;
    arguments.grid = grid_size;
    arguments.groups = (int)groups;
    arguments.eps = (float)eps;
    arguments.centered = centered;
    arguments.tf32 = tf32;
    const Device device(x);
    with_type(x, [&](auto type) {
        grid_attention_layer<decltype(type)>(arguments, (int)channels, (int)num_heads, device.stream);
    });
    return out;
}

}  // namespace
}  // namespace ipt_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(ipt_fast_cuda, CompositeExplicitAutograd, m) {
    m.impl("grid_attention_layer", TORCH_BOX(&ipt_fast::cuda::run_grid_attention_layer));
}
