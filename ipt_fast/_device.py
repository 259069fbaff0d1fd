"""Which device a program may run on."""

import torch


def usable_device(device: torch.device | str) -> torch.device:
    """``device``, on which one number has been written and read.

    Raises:
        ValueError: there is no such device here, or PyTorch cannot compute on it.
    """
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).item()
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:  # PyTorch without CUDA asserts
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"device must be usable; got {device} ({reason})") from error
    return found
