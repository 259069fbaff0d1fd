// The library ipt_fast_cpu. Its operators are called by ipt_fast.ops only; each file registers its own.
#include <Python.h>
#include <torch/library.h>

#include <string>
#include <vector>

#include "level.h"
#include "matrix_unit.h"

namespace ipt_fast::cpu {

// isa: the level in use; isa_levels: those that this processor can run; isa_known: those of its family; lowest first.
TORCH_LIBRARY(ipt_fast_cpu, m) {
    m.def("isa() -> str", [] { return std::string(kLevels[level()].name); });
    m.def("isa_levels() -> str[]", [] {
        std::vector<std::string> names;
        for (const size_t level : available_levels()) {
            names.emplace_back(kLevels[level].name);
        }
        return names;
    });
    m.def("isa_known() -> str[]", [] {
        std::vector<std::string> names;
        for (const Level& level : kLevels) {
            names.emplace_back(level.name);
        }
        return names;
    });
    m.def("emulate_amx(bool on) -> ()", [](bool on) { emulate_matrix_unit(on); });
}

}  // namespace ipt_fast::cpu

// Importing the module loads the library; it has no contents of its own.
PyMODINIT_FUNC PyInit__C() {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
