#include "layer_norm_2d_kernel.h"

const ipt_fast::LayerNorm2dKernels ipt_fast::layer_norm_2d_avx512 = ipt_fast::layer_norm_2d_kernels;
