#include "isa.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>

namespace ipt_fast {

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::avx512:
            return "avx512";
        case Isa::avx2:
            return "avx2";
        default:
            return "generic";
    }
}

std::vector<Isa> isa_levels() {
    std::vector<Isa> levels{Isa::generic};
#ifdef IPT_FAST_X86
    // These also ask whether the operating system saves the wide registers.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
        levels.push_back(Isa::avx2);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            levels.push_back(Isa::avx512);
        }
    }
#endif
    return levels;
}

Isa isa() {
    static const Isa best = isa_levels().back();
    const char* cap = std::getenv("IPT_FAST_CPU_ISA");
    if (cap == nullptr || *cap == '\0') {
        return best;
    }
    for (Isa level : {Isa::generic, Isa::avx2, Isa::avx512}) {
        if (std::string(cap) == isa_name(level)) {
            return std::min(level, best);
        }
    }
    TORCH_CHECK_VALUE(false, "IPT_FAST_CPU_ISA is '", cap, "', allowed are generic, avx2 and avx512");
}

}  // namespace ipt_fast
