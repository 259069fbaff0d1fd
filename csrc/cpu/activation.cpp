#include "activation.h"

#include <ATen/Parallel.h>

#include <algorithm>

#include "arguments.h"
#include "feed_forward_maps_kernel.h"
#include "level.h"

namespace ipt_fast::cpu {
namespace {

constexpr int64_t kGrainValues = 1 << 14;  // fewer values than this are not worth a thread

}  // namespace

bool is_activated(std::string_view activation) {
    TORCH_CHECK_VALUE(activation == "gelu" || activation == "none", "activation must be gelu or none; got ",
                      activation);
    return activation == "gelu";
}

void multiply_by_slope(const at::Tensor& grad, const at::Tensor& hidden) {
    const auto all_of = [](const at::Tensor& map) { return Channels{map.mutable_data_ptr(), map.size(1)}; };
    const int64_t channels = hidden.size(1);
    const ActivationParams params{dtype_of(hidden), channels, all_of(hidden), all_of(hidden), all_of(grad), {}};
    const auto& kernels = kernels_in_use<FeedForwardMapsKernels>();
    at::parallel_for(0, hidden.numel() / channels, std::max<int64_t>(kGrainValues / channels, 1),
                     [&](int64_t begin, int64_t end) { kernels.slope(params, begin, end); });
}

}  // namespace ipt_fast::cpu
