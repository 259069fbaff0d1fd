"""In which precision a model runs, and in which PyTorch's switches let products of float32 run."""

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def tf32_allowed() -> bool:
    """Whether products of float32 on NVIDIA GPUs may round their operands to TF32.

    True after ``torch.backends.cuda.matmul.fp32_precision = "tf32"`` (or the same for all of ``torch.backends``), and
    after the older ``torch.set_float32_matmul_precision("high")`` and ``torch.backends.cuda.matmul.allow_tf32 = True``.
    """
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def usable_dtype(dtype: torch.dtype | str, device: torch.device) -> torch.dtype:
    """``dtype``, a torch.dtype or its name, checked; for "auto" the fastest on ``device`` that suits images."""
    if isinstance(dtype, str) and dtype == "auto":
        return _fastest_dtype(device)
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if isinstance(dtype, str) or dtype not in DTYPES.values():
        raise ValueError(f'dtype must be "auto", {", ".join(DTYPES)}; got {dtype!r}')
    return dtype


def _fastest_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    # Private names, so they may be missing in another version of PyTorch.
    probes = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
    if device.type == "cpu" and any(probe() for probe in probes if probe):
        return torch.bfloat16
    return torch.float32
