// Vectors of Arm's Advanced SIMD (NEON).
#pragma once

#include "vec_arm.h"
#include "vec_no_dots.h"
