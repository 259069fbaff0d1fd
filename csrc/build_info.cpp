// How the compiled modules were built. It links nothing, so it answers even where _C cannot be loaded.
#include "build_info.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

namespace py = pybind11;

PYBIND11_MODULE(_build_info, m) {
    m.def(
        "build_info",
        [] {
            py::dict info;
            info["compiler"] = IPT_FAST_COMPILER;
            info["flags"] = IPT_FAST_FLAGS;
            info["cxx_standard"] = IPT_FAST_CXX_STANDARD;
            info["torch"] = IPT_FAST_TORCH_VERSION;
            info["cpu_isa"] = std::map<std::string, std::string> IPT_FAST_LEVEL_FLAGS;
            info["cuda_compiler"] = IPT_FAST_CUDA_COMPILER;
            info["cuda_architectures"] = IPT_FAST_CUDA_ARCHITECTURES;
            return info;
        },
        "Compiler, flags, C++ standard, torch version, flags of each CPU instruction set, CUDA architectures.");
}
