#include "depthwise_kernel.h"

namespace ipt_fast {
namespace {

template <class T, int K>
void run(const DepthwiseParams& params, void* stream) {
    const int64_t blocks = depthwise_tiles(params.shape) * depthwise_parts<T>(params.shape);
    launch(depthwise_kernel<T, K>, params, {blocks, kDepthwiseThreads, (int)sizeof(DepthwiseTile<T, K>), stream});
}

template <class T, int K>
void run(const DepthwiseGradientParams& params, void* stream) {
    const int64_t blocks = (int64_t)params.shares * depthwise_parts<T>(params.shape);
    launch(depthwise_gradient_kernel<T, K>, params,
           {blocks, kDepthwiseThreads, (int)sizeof(DepthwiseGradientTile<T, K>), stream});
}

}  // namespace

template <class T>
void depthwise(const DepthwiseParams& params, int size, void* stream) {
    size == 3 ? run<T, 3>(params, stream) : run<T, 5>(params, stream);
}

template <class T>
void depthwise_gradient(const DepthwiseGradientParams& params, float* gradient, int size, void* stream) {
    size == 3 ? run<T, 3>(params, stream) : run<T, 5>(params, stream);
    const DepthwiseSumParams sum = {params.sums, gradient, params.shares, size * size, params.shape.channels};
    launch(depthwise_sum_kernel<kDepthwiseThreads>, sum,
           {(sum.taps * sum.channels + kWarp - 1) / kWarp, kDepthwiseThreads, kDepthwiseThreads * (int)sizeof(float),
            stream});
}

template void depthwise<float>(const DepthwiseParams&, int, void*);
template void depthwise<bf16>(const DepthwiseParams&, int, void*);
template void depthwise<fp16>(const DepthwiseParams&, int, void*);
template void depthwise_gradient<float>(const DepthwiseGradientParams&, float*, int, void*);
template void depthwise_gradient<bf16>(const DepthwiseGradientParams&, float*, int, void*);
template void depthwise_gradient<fp16>(const DepthwiseGradientParams&, float*, int, void*);

}  // namespace ipt_fast
