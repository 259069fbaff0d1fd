"""Runs that are killed (SIGKILL) at chosen moments and resumed: a program, as a killed process reports nothing.

It computes nothing itself, so that its forks are as good as new processes, and faster.
"""

import csv
import io
import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path

import safetensors.torch
import torch

from ipt_fast.training import checkpoint, log, loop
from ipt_fast.training.config import TrainingConfig


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def after_step(iteration):
    step = loop.Run.step

    def patched(run, batch):
        step(run, batch)
        if run.iteration == iteration:
            die()

    loop.Run.step = patched


def in_log(iteration):
    def patched(self, row, usual=log.Log.write):
        if row["iteration"] != str(iteration):
            return usual(self, row)
        text = io.StringIO()
        csv.DictWriter(text, log.LOG_FIELDS).writerow(row)
        with self.path.open("a") as file:
            file.write(text.getvalue()[:12])
        die()

    log.Log.write = patched


def in_checkpoint(iteration):
    """In the middle of the file; of a sharded one, when all shards are there."""

    def patched(state, file, *options, usual=torch.save, **more):
        if not isinstance(state, dict) or state.get("iteration") != iteration:
            return usual(state, file, *options, **more)
        whole = io.BytesIO()
        usual(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        die()

    torch.save = patched


in_first_checkpoint = in_checkpoint


def in_shards(iteration):
    """While the shards are written: the first process has its own, the second half of it."""

    def patched(*arguments, checkpoint_id, usual=checkpoint.dcp.save, **more):
        if f"{iteration:08}" not in str(checkpoint_id):
            return usual(*arguments, checkpoint_id=checkpoint_id, **more)
        usual(*arguments, checkpoint_id=checkpoint_id, **more)
        if os.environ["RANK"] == "1":
            (path,) = checkpoint_id.glob("__1_*")
            os.truncate(path, path.stat().st_size // 2)
        die()

    checkpoint.dcp.save = patched


def before_model(iteration):
    """When the checkpoint is there, and the averaged model is not."""

    def patched(self, usual=loop.Run._whole_average):
        if self.iteration == iteration and checkpoint.find_checkpoint(self.config.out).exists():
            die()
        return usual(self)

    loop.Run._whole_average = patched


def in_model(iteration):
    calls = []

    def patched(state, path, usual=safetensors.torch.save_file, **more):
        calls.append(path)
        if 2 * len(calls) != iteration:
            return usual(state, path, **more)
        path.write_bytes(b"half")
        die()

    safetensors.torch.save_file = patched


def before_others_go(iteration):
    """When there are two checkpoints."""

    def patched(out, kept, usual=checkpoint.remove_others):
        if checkpoint.load_checkpoint(kept)["iteration"] == iteration:
            die()
        usual(out, kept)

    checkpoint.remove_others = patched


def performed(settings, resume, processes, prepare=lambda: None):
    """Exit statuses of processes that train together; -9 where they were killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        if processes > 1:
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes}
            os.environ.update({name: str(value) for name, value in names.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            prepare()
            loop.train(TrainingConfig(**settings), resume=resume)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    statuses = [os.waitpid(children[0], 0)[1]]
    if statuses[0]:  # as torchrun does
        for child in children[1:]:
            os.kill(child, signal.SIGKILL)
    statuses += [os.waitpid(child, 0)[1] for child in children[1:]]
    return [os.waitstatus_to_exitcode(status) for status in statuses]


def perform(settings, processes=1, moment=None, iteration=0):
    """Train, or be killed, say what is left, and train on."""
    out = Path(settings["out"])
    if moment is None:
        assert performed(settings, False, processes) == [0] * processes
        return {}
    statuses = performed(settings, False, processes, lambda: globals()[moment](iteration))
    left = checkpoint.find_checkpoint(out)
    found = checkpoint.load_checkpoint(left)["iteration"] if left.exists() else 0
    hidden = sorted(path.name for path in out.glob(".*"))
    assert performed(settings, left.exists(), processes) == [0] * processes
    return {"statuses": statuses, "iteration": found, "hidden": hidden}


if __name__ == "__main__":
    calls = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps([perform(**call) for call in calls]))
