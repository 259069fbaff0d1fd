"""The GPU that is measured: times by events, calls as graphs. In a rehearsal nothing runs, all times are invented."""

import statistics

import torch

FLUSHED = 256 << 20  # bytes, several times the second-level cache


class Gpu:
    """The current NVIDIA GPU."""

    device = "cuda"

    def __init__(self):
        self.name, self.capability = torch.cuda.get_device_name(), list(torch.cuda.get_device_capability())
        self._cache = torch.empty(FLUSHED, dtype=torch.int8, device="cuda")
        # All graphs share their memory: one is replayed after the other, and results are not used. The first one lives
        # as long as this object, and keeps the memory.
        self._first = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._first):
            self._cache.zero_()
        self._pool = self._first.pool()

    def seconds(self, calls, rounds=12):
        """Medians of {name: call}, taken in turns, each on a cold second-level cache."""
        for call in calls.values():
            call()
        events = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._cache.zero_()  # takes so long that the launches after it are waiting when it ends
                begin.record()
                call()
                end.record()
                events[name].append((begin, end))
            torch.cuda.synchronize()
        return {n: statistics.median(b.elapsed_time(e) for b, e in pairs) * 1e-3 for n, pairs in events.items()}

    def graph(self, call):
        """``call`` as the replay of a CUDA graph; another graph's replay may overwrite its result."""
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
            torch.cuda.synchronize()
            # torch.cuda.graph() would collect garbage first, which takes longer than most calls.
            graph.capture_begin(pool=self._pool)
            try:
                result = call()
            finally:
                graph.capture_end()
        torch.cuda.current_stream().wait_stream(side)

        def replay():
            graph.replay()
            return result

        return replay

    def arguments(self, call):
        return call.real(self.device)

    def run(self, call, backend, arguments):
        """A function that makes a `calls.Call` on a backend."""
        return call.on(backend, arguments)

    def reason_against(self, call, backend, arguments):
        return call.reason_against(backend, arguments)

    def launch(self, launch):
        """A function that runs a recorded launch; its tensors get values, which intermediate ones do not have."""
        for tensor in launch.arguments:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.normal_()
        return lambda: launch.kernel[launch.grid](*launch.arguments, **launch.meta)

    def copied(self, result):
        return [
            tensor.clone() for tensor in ((result,) if torch.is_tensor(result) else result) if torch.is_tensor(tensor)
        ]

    def check_equal(self, found, expected):
        """Raises if results differ by more than another order of sums explains, which here is 4 units."""
        for one, other in zip(found, expected, strict=True):
            error = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp(min=1e-30)
            if not error <= 4 * torch.finfo(other.dtype).eps:
                raise ValueError(f"the result differs from the default configuration's by {error:.1e}")

    def free(self):
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    def peak_gib(self, call):
        """GiB that are allocated at most while ``call`` runs."""
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - FLUSHED) / 2**30


class Rehearsal:
    """In the place of a `Gpu` where there is none: tensors on "meta", launches recorded, times invented."""

    device = "meta"
    name, capability = "rehearsal", [9, 0]

    def __init__(self):
        self._count = 0

    def seconds(self, calls, rounds=12):
        for call in calls.values():
            call()
        found = {}
        for name in calls:  # in some order, so that not always the first wins
            self._count += 1
            found[name] = 1e-5 * (10 + self._count * 7 % 11)
        return found

    def graph(self, call):
        return call

    def arguments(self, call):
        return call.arguments

    def run(self, call, backend, arguments):
        from ipt_fast.kernels import _launch

        def run():
            if backend == "cuda":  # it takes no tensors on "meta"
                return arguments[0]
            with _launch.record():
                return call.on(backend, arguments)()

        return run

    def reason_against(self, call, backend, arguments):
        return "there is no kernel" if backend not in call.operator.kernels else None

    def launch(self, launch):
        return lambda: None

    def copied(self, result):
        return result

    def check_equal(self, found, expected):
        pass

    def free(self):
        pass

    def peak_gib(self, call):
        return 1.0


def opened(rehearse):
    return Rehearsal() if rehearse else Gpu()
