// The dense convolutions of dense_convolution_kernel.h at the level it is compiled for.
#include "dense_convolution_kernel.h"

#include "winograd.h"

namespace ipt_fast::cpu {
namespace {

bool takes(const DenseConvolutionParams& p) {
    return with_types(p.dtype, p.brgemm,
                      []<typename Unit>(auto, const Unit&) { return sizeof(typename Unit::Value) == sizeof(float); });
}

int64_t packed_size(const DenseConvolutionParams& p) { return kPositions * Winograd(p).packed_size(); }
int64_t packing_scratch(const DenseConvolutionParams& p) { return kPositions * Winograd(p).of_weight(); }
int64_t tasks(const DenseConvolutionParams& p) { return Winograd(p).tasks(); }
int64_t scratch(const DenseConvolutionParams& p) { return Winograd(p).scratch(); }

void pack(const DenseConvolutionParams& p, float* scratch) {
    with_type(p.dtype, [&](auto type) { pack_winograd<decltype(type)>(p, scratch); });
}

void forward(const DenseConvolutionParams& p, int64_t begin, int64_t end, float* scratch) {
    with_type(p.dtype, [&](auto type) { convolve_winograd<decltype(type)>(p, begin, end, scratch); });
}

}  // namespace

constinit const DenseConvolutionKernels DenseConvolutionKernels::IPT_FAST_LEVEL = {
    cpu::takes, cpu::packed_size, cpu::packing_scratch, cpu::pack, cpu::tasks, cpu::scratch, cpu::forward};

}  // namespace ipt_fast::cpu
