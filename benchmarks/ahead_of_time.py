"""Compiles recorded launches for GPUs that are not there."""

import json
import pathlib
import re
import subprocess
import tempfile

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


def source_and_options(launch):
    """What triton.compile needs, with the alignment that the running kernel would find."""
    names = launch.kernel.arg_names
    values = dict(zip(names, launch.arguments, strict=False)) | launch.meta
    options = {name: values.pop(name) for name in OPTIONS if name in values}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or isinstance(value, (bool, str)):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int) and value == 1 and not parameter.do_not_specialize:
            signature[parameter.name], constants[(index,)] = "constexpr", 1
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(launch.kernel, signature, constants, attributes), options


def key_of(launch):
    """What tells kernels apart that are compiled by themselves."""
    source, options = source_and_options(launch)
    return launch.kernel.__name__, source.hash(), json.dumps(options, sort_keys=True)


def distinct(launches):
    """One launch of every kernel that would be compiled by itself."""
    seen = {}
    for launch in launches:
        if launch.kernel is not None:
            seen.setdefault(key_of(launch), launch)
    return list(seen.values())


def compiled(launch, capability=90):
    """Triton's compiled kernel for one chip; it has ``asm`` and ``metadata``."""
    source, options = source_and_options(launch)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def arguments_of(launch):
    """The values that a compiled kernel gets, in order: what is no constant of it."""
    source, _ = source_and_options(launch)
    values = dict(zip(launch.kernel.arg_names, launch.arguments, strict=False)) | launch.meta
    return [values[name] for name, kind in source.signature.items() if kind != "constexpr"]


def registers_and_stack(cubin):
    """Registers of a thread, and bytes of its stack, where spills would be."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = said_by(triton.knobs.nvidia.cuobjdump.path, "-res-usage", path)
    return tuple(int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))


def spills(ptx):
    """Bytes that a thread spills, as the assembler tells when it is asked again."""
    tools = triton.knobs.nvidia
    target = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.ptx")
        path.write_text(ptx)
        ptxas = getattr(tools, "ptxas_blackwell", tools.ptxas)  # the newest
        said = said_by(ptxas.path, "-v", f"--gpu-name={target}", path, "-o", f"{folder}/again.cubin")
    return int(re.search(r"(\d+) bytes spill stores", said)[1])


def said_by(*command):
    said = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    return said.stdout + said.stderr
