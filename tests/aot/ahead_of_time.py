"""Compiles recorded launches for GPUs that are not there, and reads registers, spills and shared memory back.

``python -m tests.aot.ahead_of_time CALL ...`` prints a JSON list of `Compiled`, one for each different kernel.
"""

import argparse
import dataclasses
import json
import pathlib
import re
import subprocess
import sys
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
# Bytes of shared memory a block may have, by compute capability.
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}


@dataclasses.dataclass(frozen=True)
class Compiled:
    kernel: str
    constants: dict
    options: dict
    capability: int
    registers: int
    spills: int  # bytes
    shared: int  # bytes


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


def _resources(kernel):
    """Registers of a thread and bytes it spills, by the tools that Triton brings."""
    tools = triton.knobs.nvidia
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = pathlib.Path(folder, "kernel.cubin"), pathlib.Path(folder, "kernel.ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _said_by(tools.cuobjdump.path, "-res-usage", cubin)
        registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
        if stack == 0:  # where spills would be
            return registers, 0
        ptx.write_text(kernel.asm["ptx"])
        target = re.search(r"^\.target (\w+)", kernel.asm["ptx"], re.MULTILINE)[1]
        ptxas = getattr(tools, "ptxas_blackwell", tools.ptxas)  # the newest
        said = _said_by(ptxas.path, "-v", f"--gpu-name={target}", ptx, "-o", f"{folder}/again.cubin")
        return registers, int(re.search(r"(\d+) bytes spill stores", said)[1])


def _said_by(*command):
    said = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=True)
    return said.stdout + said.stderr


def compile_launch(launch, capability):
    """`Compiled` for one chip."""
    source, options = source_and_options(launch)
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(source, target=target, options=options)
    registers, spills = _resources(kernel)
    constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
    return Compiled(launch.kernel.__name__, constants, options, capability, registers, spills, kernel.metadata.shared)


def distinct(launches):
    """One launch of every kernel that would be compiled by itself."""
    seen = {}
    for launch in launches:
        if launch.kernel is not None:
            source, options = source_and_options(launch)
            key = (launch.kernel.__name__, source.hash(), json.dumps(options, sort_keys=True))
            seen.setdefault(key, launch)
    return list(seen.values())


def main():
    from tests.aot.calls import record_calls

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="", help="regular expression: names of the calls")
    parser.add_argument("--capability", type=int, action="append", choices=SHARED_MEMORY, help="default: all")
    parser.add_argument("--choice", type=int, default=0, help="configuration of every kernel, 0 is the default one")
    parser.add_argument("--narrow", action="store_true", help="of every operator only the first matching call")
    args = parser.parse_args()
    found = []
    for launch in distinct(record_calls(args.pattern, args.choice, args.narrow)):
        for capability in args.capability or SHARED_MEMORY:
            found.append(dataclasses.asdict(compile_launch(launch, capability)))
            print(json.dumps(found[-1], default=str), file=sys.stderr, flush=True)
    print(json.dumps(found, default=str))


if __name__ == "__main__":
    main()
