"""A model's config as one more tensor of its state dict, for programs that read nothing else of a file.

The tensor ``ipt_fast_config`` has the version of this form, 1, and then the bytes of a JSON object: the class of the
model as "model" and the fields of its config. It is of int32, the smallest type that such programs read. It is in files
only; a model has no such buffer, and leaves it out where it loads one.
"""

import json
from typing import Any

import torch
from torch import Tensor

NAME = "ipt_fast_config"
VERSION = 1


def to_record(fields: dict[str, Any]) -> Tensor:
    """The fields, which JSON must hold, as a tensor."""
    return torch.tensor([VERSION, *json.dumps(fields).encode()], dtype=torch.int32)


def from_record(record: Tensor) -> dict[str, Any]:
    """The fields that a tensor holds.

    Raises:
        ValueError: it holds none, or those of a later version.
    """
    version, *codes = record.flatten().tolist()
    if version != VERSION:
        raise ValueError(f"{NAME} must be of version {VERSION}, which this version of ipt_fast reads; got {version}")
    try:
        fields = json.loads(bytes(codes))
    except ValueError as error:
        raise ValueError(f"{NAME} must hold JSON; got {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{NAME} must hold one JSON object; got {type(fields).__name__}")
    return fields
