"""Parity of one backend with the reference in float64, by the rule of the tests: a JSON line a case in parity.jsonl.

A line has ``operator``, ``backend``, ``dtype``, ``shape``, ``case``, ``passed``, ``seconds``, and ``errors``: {name of
the output or of a gradient: [error, allowed]}; ``error`` and ``allowed`` are those nearest to failing, ``traceback``
tells what else went wrong.

Cases are shared out to processes. A process in which the GPU no longer answers ends, and another goes on.
"""

import functools
import itertools
import multiprocessing
import os
import time
import traceback

import torch

import ipt_fast
from benchmarks.gpu import calls, large, stage
from tests.cuda import cases as cuda_cases
from tests.gpu import cases as gpu_cases
from tests.ops import cases

SIDES, BATCH = (70, 101), 2  # more than two windows of 32, and borders
REHEARSED = {
    "cuda": ("leffn layer 32 ", "grid layer 32 g8 "),
    "triton": ("layer_norm_2d", "layer_norm_2d/each_image", "leffn_layer/modulated", "merge_pointwise"),
}


def judged(backend, gradients, repeats, built):
    """What is found of a call that ``built()`` makes, for its line; raises if ``repeats`` of it differ."""
    operator, tensors, options = built()
    function = getattr(ipt_fast.ops, operator)
    with ipt_fast.use_backend("reference"), torch.no_grad():
        grad = torch.randn_like(function(**tensors, **options))

    def got():
        with ipt_fast.use_backend(backend):
            if gradients:
                return cases.forward_and_gradients(function, tensors, options, grad)
            with torch.no_grad():
                return {"out": function(**tensors, **options)}

    first = got()
    for _ in range(repeats):
        again = got()
        different = [name for name, value in again.items() if not torch.equal(value, first[name])]
        assert not different, f"not the same twice: {different}"
    truth = cases.exact.__wrapped__(operator, tensors, options, grad)
    results = [(first, truth, cases.baseline.__wrapped__(operator, tensors, options, grad))]
    while cases.beyond_rule(results) and results[0][2].draw():
        pass
    return described(operator, tensors, cases.errors_and_limits(results))


def described(operator, tensors, found):
    """The line's fields that tell of ``found``, {name: (error, allowed)}."""
    first = next(iter(tensors.values()))
    error, allowed = max(found.values(), key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else float("inf"))
    return {
        "operator": operator,
        "dtype": _name(first.dtype),
        "shape": list(first.shape),
        "passed": all(error <= allowed for error, allowed in found.values()),
        "error": float(f"{error:.3g}"),
        "allowed": float(f"{allowed:.3g}"),
        "errors": {name: [float(f"{value:.3g}") for value in pair] for name, pair in found.items()},
    }


def of_call(call, sides, batch):
    """(operator, tensors, options) of one of the models' calls on a map of another size."""
    arguments = call.forward().real(cases.DEVICE, sides, batch)
    named = dict(zip(call.operator.arguments, arguments, strict=True))
    tensors = {name: value for name, value in named.items() if isinstance(value, torch.Tensor)}
    return call.operator.name, tensors, {name: value for name, value in named.items() if name not in tensors}


def label_of(module, name, dtype):
    """The operator's name, the case's, and the dtype."""
    return f"{module.SIZES[name][0]}: {name} {_name(dtype)}"


def cuda_cases_by_label():
    found = {}
    for dtype, name in itertools.product((torch.bfloat16, torch.float32, torch.float16), cuda_cases.SIZES):
        merges = name.startswith("merge")
        build = functools.partial(cuda_cases.build, name, dtype)
        found[label_of(cuda_cases, name, dtype)] = functools.partial(judged, "cuda", merges, 3, build)
    for dtype, size in itertools.product((torch.bfloat16, torch.float32), (3, 5)):
        found[f"depthwise {size} {_name(dtype)}"] = functools.partial(_depthwise, size, dtype)
    layers = ("leffn_layer", "focal_attention_layer", "grid_attention_layer")
    for call in calls.of_models(training=False):
        if call.name in layers and call.forward_arguments[0].shape[1] in (32, 48, 64, 96):
            build = functools.partial(of_call, call, None, None)
            found[f"{call.label} full"] = functools.partial(judged, "cuda", False, 3, build)
    return found


def _depthwise(size, dtype):
    cuda_cases.check_depthwise(200, size, 77, 130, dtype)
    return {"operator": "depthwise", "dtype": _name(dtype), "shape": [2, 200, 77, 130], "passed": True}


def triton_cases_by_label():
    found = {}
    for call in sorted(calls.of_models(), key=lambda call: call.is_backward):
        sides = SIDES if call.operator.images else None
        build = functools.partial(of_call, call, sides, BATCH if sides else None)
        repeats = 2 if call.is_backward else 1
        found.setdefault(
            f"{call.name} {call.key}" if sides else call.label,
            functools.partial(judged, "triton", call.is_backward, repeats, build),
        )
    for dtype, name in itertools.product((torch.float32, torch.float16, torch.bfloat16), gpu_cases.SIZES):
        if dtype == torch.bfloat16 and "modulated" not in name:  # the models' own calls have been in it
            continue
        build = functools.partial(gpu_cases.build, name, dtype)
        found[label_of(gpu_cases, name, dtype)] = functools.partial(judged, "triton", True, 1, build)
    return found


def rehearsed_cases(backend):
    small = [name for name in cuda_cases.SIZES if f"{name} ".startswith(REHEARSED["cuda"])]
    if backend == "cuda":
        return {
            label_of(cuda_cases, name, torch.bfloat16): functools.partial(
                judged, "cuda", False, 1, functools.partial(cuda_cases.build, name, torch.bfloat16)
            )
            for name in small
        }
    return {
        f"{name} float32": functools.partial(
            judged, "triton", True, 1, functools.partial(cases.build, name, (1, 5, 6), torch.float32)
        )
        for name in REHEARSED["triton"]
    }


def large_cases(backend):
    return {f"{name} above 2^31 values": functools.partial(_large, name, backend) for name in large.CHECKS}


def _large(name, backend):
    compared, error, allowed = large.check(name, backend)
    return described(name, {"compared": compared}, {"out": (error, allowed)})


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def cases_of(args):
    """{label: function} of the cases that were asked for."""
    if args.rehearse:
        found = rehearsed_cases(args.backend)
    elif args.large:
        found = large_cases(args.backend)
    else:
        found = cuda_cases_by_label() if args.backend == "cuda" else triton_cases_by_label()
    return {label: case for label, case in found.items() if args.only.search(label)}


def work(args, counter):
    """Runs cases until there are none; each process takes the next one."""
    path, backend = args.out / "parity.jsonl", args.backend
    if not args.rehearse:
        cases.DEVICE = "cuda"
    found = cases_of(args)
    labels = list(found)
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # the baselines' float32 is float32
    torch.use_deterministic_algorithms(True, warn_only=True)  # which poisons unwritten memory with NaN
    while True:
        with counter.get_lock():
            index, counter.value = counter.value, counter.value + 1
        if index >= len(labels):
            return
        began = time.monotonic()
        line = {"backend": backend, "case": labels[index], "passed": False, "traceback": None}
        lost = False
        try:
            torch.manual_seed(0)
            line |= found[labels[index]]()
        except Exception as error:
            line["traceback"] = traceback.format_exc(limit=-6)[-3000:]
            lost = stage.is_lost(error)
        stage.write_json(path, line | {"seconds": round(time.monotonic() - began, 2)})
        if torch.cuda.is_initialized() and not lost:
            torch.cuda.empty_cache()
        if lost:
            os._exit(stage.LOST)


def main():
    args = stage.arguments(
        __doc__, backend=dict(choices=("cuda", "triton"), required=True), processes=dict(type=int, default=1),
        large=dict(action="store_true"),
    )  # fmt: skip
    path, wanted = args.out / "parity.jsonl", set(cases_of(args))
    before, total = len(stage.read_json_lines(path)), len(wanted)
    context = multiprocessing.get_context("spawn")  # a fork would inherit a CUDA that it cannot use
    counter = context.Value("i", 0)
    new = functools.partial(context.Process, target=work, args=(args, counter))
    running = [new() for _ in range(args.processes)]
    for process in running:
        process.start()
    while running:
        process = running.pop(0)
        process.join()
        if process.exitcode == stage.LOST and counter.value < total:
            running.append(new())
            running[-1].start()
    # Another stage may have written to the same file meanwhile.
    lines = [each for each in stage.read_json_lines(path)[before:] if each["backend"] == args.backend]
    lines = [line for line in lines if line["case"] in wanted]
    failed = [line for line in lines if not line["passed"]]
    for line in failed:
        why = line["traceback"] or f"error and limit {line['errors']}"
        print(f"FAILED: {line['backend']} {line['case']}: {why[-400:]}", flush=True)
    print(f"{args.backend}: {len(lines) - len(failed)} of {total} cases passed, {len(failed)} failed", flush=True)
    raise SystemExit(total == 0 or len(lines) - len(failed) != total)


if __name__ == "__main__":
    main()
