// Vectors of AVX-512 (F, BW, DQ, VL).
#pragma once

#include "vec_512.h"

namespace ipt_fast::cpu {
namespace {

constexpr bool kMatrixUnit = false;

}  // namespace
}  // namespace ipt_fast::cpu

#include "vec_no_dots.h"
