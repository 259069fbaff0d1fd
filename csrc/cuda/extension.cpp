// The library ipt_fast_cuda. Its operators are called by ipt_fast.ops only; each file registers its own.
#include <Python.h>

#include "bindings.cuh"
#include "merge.cuh"

STABLE_TORCH_LIBRARY_FRAGMENT(ipt_fast_cuda, m) {
    m.def("device() -> str");
    m.def("device_error(int index) -> str");
#ifdef IPT_FAST_EMULATED
    m.def("set_reversed(bool reversed) -> ()");
#endif
}

namespace {
std::string device() { return ipt_fast::cuda::device_name(); }

// Why kernels cannot run on the GPU of this index; empty if they can.
std::string device_error(int64_t index) {
    const torch::stable::accelerator::DeviceGuard guard((torch::stable::accelerator::DeviceIndex)index);
    return ipt_fast::cuda::merge_error();
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ipt_fast_cuda, CompositeExplicitAutograd, m) {
    m.impl("device", TORCH_BOX(&device));
    m.impl("device_error", TORCH_BOX(&device_error));
#ifdef IPT_FAST_EMULATED
    m.impl("set_reversed", TORCH_BOX(&ipt_fast::cuda::emulator::set_reversed));
#endif
}

// Importing the module loads the library; it has no contents of its own.
PyMODINIT_FUNC PyInit__C_cuda() {
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
