"""What was restored from what, recorded beside the results, so that a later run skips only what it would make again.

Every format has the record so, also those without room for metadata, and a result tells nobody what it was made from.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

NAME = ".ipt_fast_results.jsonl"


class Journal:
    """The records of a folder of results: one JSON object a line, in a hidden file that is only ever added to.

    A record holds the SHA-256 of the result's content, so it is about this file and no other of its name. It is added
    before the result takes its place: a run that is killed between the two leaves a record that fits no file, which
    does no harm, and never a result without its record.
    """

    def __init__(self, folder: Path):
        self._path = folder / NAME
        self._records: dict[str, list[dict]] = {}
        content = self._path.read_bytes() if self._path.is_file() else b""
        for line in content.splitlines():
            try:
                record = json.loads(line)
                self._records.setdefault(record["result"], []).append(record)
            except (ValueError, TypeError, KeyError, RecursionError):  # a line that a killed run did not finish
                continue

    def holds(self, result: Path, made_from: dict[str, Any]) -> bool:
        """Whether the file ``result`` is known to be made from just this."""
        records = [record for record in self._records.get(result.name, []) if record.get("made_from") == made_from]
        return bool(records) and digest_of_file(result) in [record.get("sha256") for record in records]

    def add(self, result: Path, sha256: str, made_from: dict[str, Any]) -> None:
        """Record that the content with this checksum, which becomes ``result``, is made from this.

        Raises:
            OSError: the record cannot be written.
        """
        record = {"result": result.name, "sha256": sha256, "made_from": made_from}
        # One write, with a line end on both sides: what a killed run left unfinished spoils no other line.
        line = f"\n{json.dumps(record)}\n".encode()
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            os.write(descriptor, line)
        finally:
            os.close(descriptor)
        self._records.setdefault(result.name, []).append(record)


def digest_of_file(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_of_model(model: nn.Module) -> str:
    """SHA-256 of a model's class, config and weights, wherever they were read from."""
    digest = hashlib.sha256(f"{type(model).__name__} {getattr(model, 'config', None)}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
