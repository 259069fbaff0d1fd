// The library ipt_fast_cpu. Its operators are called by ipt_fast.ops only; each file registers its own.
#include <Python.h>
#include <torch/library.h>

#include "isa.h"

TORCH_LIBRARY(ipt_fast_cpu, m) {
    m.def("isa() -> str", [] { return std::string(ipt_fast::isa_name(ipt_fast::isa())); });
    m.def("isa_levels() -> str[]", [] {
        std::vector<std::string> names;
        for (ipt_fast::Isa isa : ipt_fast::isa_levels()) {
            names.emplace_back(ipt_fast::isa_name(isa));
        }
        return names;
    });
    m.def("emulate_amx(bool on) -> ()", [](bool on) { ipt_fast::emulate_amx(on); });
}

// Importing the module loads the library; it has no contents of its own.
PyMODINIT_FUNC PyInit__C() {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
