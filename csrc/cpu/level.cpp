#include "level.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <iterator>
#include <string>

#include "matrix_unit.h"

namespace ipt_fast::cpu {
namespace {

constexpr size_t kCount = std::size(kLevels);

thread_local std::optional<size_t> kept;

bool available(size_t level) {
    return kLevels[level].has_vectors() && (!kLevels[level].matrix_unit || has_matrix_unit());
}

// The level that IPT_FAST_CPU_ISA names, or the highest one that needs no request.
size_t highest_allowed() {
    const char* cap = std::getenv("IPT_FAST_CPU_ISA");
    if (cap == nullptr || *cap == '\0') {
        size_t level = kCount - 1;
        while (kLevels[level].splits) {
            --level;
        }
        return level;
    }
    std::string names;
    for (size_t level = 0; level < kCount; ++level) {
        if (std::string(cap) == kLevels[level].name) {
            return level;
        }
        names += (level > 0 ? ", " : "") + std::string(kLevels[level].name);
    }
    TORCH_CHECK_VALUE(false, "IPT_FAST_CPU_ISA must be one of ", names, "; got '", cap, "'");
}

}  // namespace

std::vector<size_t> available_levels() {
    std::vector<size_t> levels;
    for (size_t level = 0; level < kCount; ++level) {
        if (available(level)) {
            levels.push_back(level);
        }
    }
    return levels;
}

size_t level() {
    if (kept.has_value()) {
        return *kept;
    }
    size_t level = highest_allowed();
    while (!available(level)) {  // the lowest one always is
        --level;
    }
    return level;
}

KeptLevel::KeptLevel() : before_(kept) { kept = level(); }

KeptLevel::~KeptLevel() { kept = before_; }

}  // namespace ipt_fast::cpu
