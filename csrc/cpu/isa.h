// Which of the compiled instruction sets runs: the best one the processor has, capped by IPT_FAST_CPU_ISA.
#pragma once

#include <string>
#include <vector>

namespace ipt_fast {

// amx is avx512 with bf16 products on the matrix unit.
enum class Isa { generic, avx2, avx512, amx };

const char* isa_name(Isa isa);

// The levels that this processor can run, lowest first.
std::vector<Isa> isa_levels();

// The level in use. IPT_FAST_CPU_ISA is read on every call; an unknown value raises.
Isa isa();

// For tests: the level amx without the unit, its product computed by a plain loop.
void emulate_amx(bool on);
bool amx_is_emulated();

}  // namespace ipt_fast
