"""Compiles recorded launches for GPUs that are not there, and reads registers, spills and shared memory back.

``python -m tests.aot.ahead_of_time CALL ...`` prints a JSON list of `Compiled`, one for each different kernel.
"""

import argparse
import dataclasses
import json
import sys

from benchmarks.ahead_of_time import compiled, distinct, registers_and_stack, source_and_options, spills

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


def compile_launch(launch, capability):
    """`Compiled` for one chip."""
    source, options = source_and_options(launch)
    kernel = compiled(launch, capability)
    registers, stack = registers_and_stack(kernel.asm["cubin"])
    constants = {source.fn.arg_names[path[0]]: value for path, value in source.constants.items()}
    return Compiled(
        launch.kernel.__name__, constants, options, capability, registers, spills(kernel.asm["ptx"]) if stack else 0,
        kernel.metadata.shared,
    )  # fmt: skip


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
