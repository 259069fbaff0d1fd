#include "epilogue.h"

#include <ATen/ops/ones.h>

namespace ipt_fast::cpu {

LayerEpilogue::LayerEpilogue(const at::Tensor& x, const OptionalTensor& bias_, const OptionalTensor& gate_) {
    if (!bias_.has_value() && !gate_.has_value()) {
        return;
    }
    const int64_t size = padded(x.size(1));
    bias = padded_parameter(bias_, size);
    if (gate_.has_value()) {
        check_of_images(*gate_, "gate", x);
        gate = padded_parameter(gate_, size);
    } else {
        gate = at::ones({size}, at::kFloat);
    }
    params = {bias.const_data_ptr<float>(), gate.const_data_ptr<float>(), stride_of_images(gate)};
}

}  // namespace ipt_fast::cpu
