"""``ipt-fast restore --ray``: the same work by many processes, on one machine or many, each result written once.

Workers write into a hidden folder beside the results, a place of its own for each attempt at an image, and report. The
process that was started moves what is reported to where it belongs, and records it. So a result takes its place once,
whatever happens to workers. What one did that died before it could report is not done again, since the next attempt
finds it. An image that ends its worker again and again is given up.
"""

import argparse
import contextlib
import dataclasses
import logging
import os
import pickle
import secrets
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from .. import use_backend
from ..inference import Restorer
from ..inference.ray import map_rows, require_ray, worker_restorer, workers_with_room
from ._jobs import Job
from ._journal import digest_of_file
from ._results import Results
from ._work import Outcome, Work, caught, restorer_options

ATTEMPTS = 3
_REPORT = "report.pickle"


@dataclasses.dataclass
class Report:
    """What a worker tells of one image: what to say, and (result, file, checksum, made from) of all it wrote."""

    outcome: Outcome
    files: list[tuple[Path, Path, str, dict[str, Any]]]


class RestoreJobs:
    """The worker: rows with a pickled ``Job`` in, rows with a pickled ``Report`` out.

    Args:
        model: a ``ray.ObjectRef`` of the model.
        args: the options of the command.
        made_with: the model and the options, as the journal has them.
        folder: where attempts go.
        here: the folder that relative paths start from.
    """

    def __init__(
        self, model: Any, args: argparse.Namespace, made_with: dict[str, Any], folder: Path, here: str
    ) -> None:
        os.chdir(here)
        self._folder, self._place, self._files = folder, folder, list[tuple[Path, Path, str, dict[str, Any]]]()
        self._work = Work(_restorer(model, args), args, made_with, self._write)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list]:
        reports = [self._report(*row) for row in zip(batch["index"].tolist(), batch["job"], strict=True)]
        return {"index": batch["index"].tolist(), "report": [pickle.dumps(report) for report in reports]}

    def _report(self, index: int, job: bytes) -> Report:
        for attempt in range(ATTEMPTS):
            self._place = self._folder / f"{index}.{attempt}"
            try:
                self._place.mkdir()
            except FileExistsError:  # of a worker that died
                with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
                    return pickle.loads((self._place / _REPORT).read_bytes())
            except OSError as error:
                return Report(Outcome(error=str(error)), [])
            else:
                break
        else:
            return Report(Outcome(error=f"each of {ATTEMPTS} processes that restored it was killed"), [])
        return self.restore(pickle.loads(job))

    def restore(self, job: Job) -> Report:
        """Restore one image into this attempt's folder."""
        self._files = []
        with use_backend(self._work.args.backend):
            report = Report(self._work.attempt(job), self._files)
        unfinished = self._place / f".{_REPORT}"
        with contextlib.suppress(OSError):  # a full disk, say; it is for the next attempt, if there is one
            unfinished.write_bytes(pickle.dumps(report))
            unfinished.rename(self._place / _REPORT)
        return report

    @contextlib.contextmanager
    def _write(self, result: Path, made_from: dict[str, Any]) -> Iterator[Path]:
        path = self._place / result.name
        try:
            yield path
        except BaseException:
            path.unlink(missing_ok=True)  # half of a file may fill the disk
            raise
        self._files.append((result, path, digest_of_file(path), made_from))


def check_ray(args: argparse.Namespace) -> None:
    """Raise ValueError for wrong options of Ray, or where it is not installed; set the number of CPUs if not given."""
    for name in ("workers", "cpus", "gpus"):
        value = getattr(args, f"ray_{name}")
        if value is not None and not args.ray:
            raise ValueError(f"--ray-{name} must be left out without --ray; got {value:g}")
    if args.ray_workers is not None and args.ray_workers < 1:
        raise ValueError(f"--ray-workers must be at least 1; got {args.ray_workers}")
    if args.ray:
        try:
            require_ray()
        except ImportError as error:
            raise ValueError(f"--ray must be left out without Ray; got it ({error})") from error
    args.ray_cpus = 1 if args.ray_cpus is None else args.ray_cpus
    if not 0 < args.ray_cpus < float("inf"):
        raise ValueError(f"--ray-cpus must be positive and finite; got {args.ray_cpus:g}")
    if args.ray_gpus is not None and not 0 <= args.ray_gpus < float("inf"):
        raise ValueError(f"--ray-gpus must be finite and at least 0; got {args.ray_gpus:g}")


def restore_on_ray(
    jobs: Sequence[Job],
    model: torch.nn.Module,
    args: argparse.Namespace,
    made_with: dict[str, Any],
    results: Results,
    worker: type[RestoreJobs] = RestoreJobs,
) -> dict[Job, str]:
    """Restore and print; the images that failed, and why.

    Raises:
        ValueError: bad options, or a worker for which no machine has room.
        RuntimeError: the demanded backend cannot run the model, or Ray fails.
    """
    ray = require_ray()
    with _started(ray), _plain_errors(ray):
        if args.ray_gpus is None:
            args.ray_gpus = 1 if args.device != "cpu" and ray.cluster_resources().get("GPU") else 0
        resources = {"num_cpus": args.ray_cpus, "num_gpus": args.ray_gpus}
        room = workers_with_room(args.ray_cpus, args.ray_gpus)
        if room < 1:
            wanted = f"{args.ray_cpus:g} and {args.ray_gpus:g}"
            raise ValueError(f"--ray-cpus and --ray-gpus must be what a machine of the cluster has; got {wanted}")
        stored, here = ray.put(model), os.getcwd()
        ray.get(ray.remote(max_retries=0, **resources)(_try_one_pixel).remote(stored, args))
        folder = jobs[0].destination.parent / f".ipt_fast_ray_{secrets.token_hex(8)}"
        arguments = {"model": stored, "args": args, "made_with": made_with, "folder": folder, "here": here}
        rows = [{"index": index, "job": pickle.dumps(job)} for index, job in enumerate(jobs)]
        folder.mkdir()
        try:
            workers = min(args.ray_workers or room, room)
            return _take(jobs, map_rows(rows, worker, arguments, workers=workers, **resources), results)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _restorer(model: Any, args: argparse.Namespace) -> Restorer:
    options = restorer_options(args) | {"device": args.device}
    with use_backend(args.backend):
        return worker_restorer(model, cpus=args.ray_cpus, gpus=args.ray_gpus, **options)


def _try_one_pixel(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """What a worker cannot do at all is a wrong call, and not the failure of each of many images."""
    with use_backend(args.backend):
        _restorer(model, args).try_one_pixel()


def _take(jobs: Sequence[Job], rows: Iterator[dict[str, Any]], results: Results) -> dict[Job, str]:
    """Put what is reported into its place, and say it."""
    failed, missing = {}, dict(enumerate(jobs))
    with tqdm(total=len(jobs), unit="image", leave=False, disable=None) as bar:
        for row in rows:
            report: Report = pickle.loads(row["report"])
            job, outcome = missing.pop(int(row["index"])), report.outcome
            with caught() as placed:
                for result, content, sha256, made_from in report.files:
                    results.place(result, content, sha256, made_from)
            outcome.warnings += placed.warnings
            outcome.error = outcome.error or placed.error
            if outcome.error:
                failed[job] = outcome.error
            outcome.say(bar, job)
            bar.update()
        for job in missing.values():
            failed[job] = "Ray has given it up"
            Outcome(error=failed[job]).say(bar, job)
    return failed


@contextlib.contextmanager
def _started(ray: Any) -> Iterator[None]:
    """Ray, started for the block unless it runs in this process already."""
    if ray.is_initialized():
        yield
        return
    # It would tell its makers of every run, print what concerns its own parts only, and let all else run first.
    for name, value in (("USAGE_STATS_ENABLED", "0"), ("BACKEND_LOG_LEVEL", "fatal"), ("worker_niceness", "0")):
        os.environ.setdefault(f"RAY_{name}", value)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    in_main = threading.current_thread() is threading.main_thread()  # where Ray sets a handler of its own
    at_sigterm = signal.getsignal(signal.SIGTERM)
    with _only_of_failures():
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()
        if in_main:
            signal.signal(signal.SIGTERM, at_sigterm)


@contextlib.contextmanager
def _plain_errors(ray: Any) -> Iterator[None]:
    """Errors of workers as they were there, and those of Ray itself as a RuntimeError."""
    try:
        yield
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise RuntimeError(f"Ray cannot go on: {error}") from error


@contextlib.contextmanager
def _only_of_failures() -> Iterator[None]:
    """Show what the block, and the libraries it calls, write to standard error only where the block fails."""
    with tempfile.TemporaryFile() as held:
        before = os.dup(2)
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(before, held.read())
            raise
        finally:
            os.dup2(before, 2)
            os.close(before)
