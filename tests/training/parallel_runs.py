"""Runs of several processes, as torchrun starts this program: one after the other, as a file of settings tells."""

import json
import os
import signal
import sys
from pathlib import Path

from ipt_fast.training import loop
from ipt_fast.training.config import TrainingConfig


def stopping(iteration, step=loop.Run.step):
    def stopped(run, batch):
        step(run, batch)
        if run.iteration == iteration:
            os.kill(os.getpid(), signal.SIGTERM)

    return stopped


def perform(settings, resume=False, stop=0):
    """Train, from the last checkpoint or until so many iterations are done."""
    usual = loop.Run.step
    loop.Run.step = stopping(stop, usual)
    try:
        return loop.train(TrainingConfig(**settings), resume=resume)
    finally:
        loop.Run.step = usual


if __name__ == "__main__":
    for arguments in json.loads(Path(sys.argv[1]).read_text()):
        perform(**arguments)
