// leffn and leffn_layer: registration of their forward, a form of the feed-forward network.
#include <torch/library.h>

#include "feed_forward.h"

namespace ipt_fast::cpu {
namespace {

at::Tensor pack_leffn(const at::Tensor& expand_weight, const at::Tensor& depthwise_weight,
                      const at::Tensor& project_weight, const OptionalTensor& expand_bias,
                      const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias) {
    const FeedForwardWeights w{expand_weight, depthwise_weight, project_weight,
                               expand_bias,   depthwise_bias,   project_bias};
    w.check();
    return pack(Layer::leffn, nullptr, w, {});
}

at::Tensor pack_leffn_layer(const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                            const at::Tensor& expand_weight, const at::Tensor& depthwise_weight,
                            const at::Tensor& project_weight, const OptionalTensor& expand_bias,
                            const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias,
                            const OptionalTensor& gate, double eps, bool centered) {
    return pack_layer(Layer::leffn_layer, norm_weight, norm_bias,
                      {expand_weight, depthwise_weight, project_weight, expand_bias, depthwise_bias, project_bias},
                      gate, eps, centered);
}

at::Tensor leffn_packed(const at::Tensor& x, const at::Tensor& packed_) {
    const Packed<PackedFeedForward> packed(packed_, Layer::leffn, x);
    return run(Layer::leffn, x, packed, {}, epilogue_of(packed.header(), x, {}).params);
}

at::Tensor leffn_layer_packed(const at::Tensor& x, const at::Tensor& packed, const OptionalTensor& norm_weight,
                              const OptionalTensor& norm_bias, const OptionalTensor& gate) {
    return run_layer(Layer::leffn_layer, x, packed, norm_weight, norm_bias, gate);
}

at::Tensor leffn(const at::Tensor& x, const at::Tensor& expand_weight, const at::Tensor& depthwise_weight,
                 const at::Tensor& project_weight, const OptionalTensor& expand_bias,
                 const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias) {
    const FeedForwardWeights w{expand_weight, depthwise_weight, project_weight,
                               expand_bias,   depthwise_bias,   project_bias};
    w.check(x);
    const KeptLevel level;
    return leffn_packed(x, pack(Layer::leffn, nullptr, w, {}));
}

at::Tensor leffn_layer(const at::Tensor& x, const at::Tensor& norm_weight, const OptionalTensor& norm_bias,
                       const at::Tensor& expand_weight, const at::Tensor& depthwise_weight,
                       const at::Tensor& project_weight, const OptionalTensor& expand_bias,
                       const OptionalTensor& depthwise_bias, const OptionalTensor& project_bias,
                       const OptionalTensor& gate, double eps, bool centered) {
    const FeedForwardWeights w{expand_weight, depthwise_weight, project_weight,
                               expand_bias,   depthwise_bias,   project_bias};
    w.check(x);
    const KeptLevel level;
    const at::Tensor packed = pack_layer(Layer::leffn_layer, {}, {}, w, {}, eps, centered);
    return leffn_layer_packed(x, packed, norm_weight, norm_bias, gate);
}

}  // namespace

TORCH_LIBRARY_IMPL(ipt_fast_cpu, CPU, m) {
    m.impl("leffn", leffn);
    m.impl("leffn_layer", leffn_layer);
    m.impl("pack_leffn", pack_leffn);
    m.impl("pack_leffn_layer", pack_leffn_layer);
    m.impl("leffn_packed", leffn_packed);
    m.impl("leffn_layer_packed", leffn_layer_packed);
}

}  // namespace ipt_fast::cpu
