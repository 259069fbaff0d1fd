"""In which precision PyTorch's switches let products of float32 run."""

import torch


def tf32_allowed() -> bool:
    """Whether products of float32 on NVIDIA GPUs may round their operands to TF32.

    True after ``torch.backends.cuda.matmul.fp32_precision = "tf32"`` (or the same for all of ``torch.backends``), and
    after the older ``torch.set_float32_matmul_precision("high")`` and ``torch.backends.cuda.matmul.allow_tf32 = True``.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
