#include "isa.h"

#include <ATen/native/CPUBlas.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

namespace ipt_fast {
namespace {

std::atomic<bool> emulated = false;

}  // namespace

void emulate_amx(bool on) { emulated = on; }
bool amx_is_emulated() { return emulated; }

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::amx:
            return "amx";
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
            static const bool has_amx = at::native::cpublas::could_pack(at::kBFloat16);
            if (has_amx || emulated) {
                levels.push_back(Isa::amx);
            }
        }
    }
#endif
    return levels;
}

Isa isa() {
    static const Isa best_of_processor = isa_levels().back();
    const Isa best = emulated ? isa_levels().back() : best_of_processor;
    const char* cap = std::getenv("IPT_FAST_CPU_ISA");
    if (cap == nullptr || *cap == '\0') {
        return best;
    }
    for (Isa level : {Isa::generic, Isa::avx2, Isa::avx512, Isa::amx}) {
        if (std::string(cap) == isa_name(level)) {
            return std::min(level, best);
        }
    }
    TORCH_CHECK_VALUE(false, "IPT_FAST_CPU_ISA is '", cap, "', allowed are generic, avx2, avx512 and amx");
}

}  // namespace ipt_fast
