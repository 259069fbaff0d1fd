"""Running a model on the tiles of an image: precision, self-ensemble, and less at once where memory runs out."""

import itertools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..freezing import Frozen
from ..models.contract import Contract
from ..modules.padding import crop, pad_to_size
from ._plan import Plan, Span

T = TypeVar("T")
Progress = Callable[[int, int], None]
# (transpose, flipped axes), the identity first
_VIEWS = [(transpose, axes) for transpose in (False, True) for axes in ((), (2,), (3,), (2, 3))]


class Runner:
    """A model on its device, that is given the tiles of images in [0, 1].

    Args:
        model: frozen, or in eval mode and in float32, on ``device``.
        contract: the model's.
        scale: how many times larger than a tile its output is.
        arguments: what it gets beside tiles.
        dtype: other than float32 under autocast.
        self_ensemble: the mean over the 8 flips and transposes of a tile.
    """

    def __init__(
        self,
        model: nn.Module,
        contract: Contract,
        *,
        scale: int,
        arguments: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        self_ensemble: bool,
    ) -> None:
        self.model, self.contract, self.scale, self.arguments = model, contract, scale, arguments
        self.device, self.dtype, self.self_ensemble = device, dtype, self_ensemble

    def run_plan(
        self, image: Tensor, plan: Plan, *, at_once: int = 1, limit: int | None = None, progress: Progress | None = None
    ) -> Tensor:
        """The outputs of all tiles, weighted and put together: (B, C, H, W) -> (B, C', s H, s W).

        The model gets ``at_once`` tiles of every image, but never more than ``limit`` in all.
        """
        batch, scale = len(image), self.scale
        output: Tensor | None = None
        done, total = 0, len(plan.rows) * len(plan.columns)
        tiles = itertools.product(plan.rows, plan.columns)
        while chunk := list(itertools.islice(tiles, at_once)):
            parts = [image[..., _place(row, scale), _place(column, scale)] for row, column in chunk]
            stacked = torch.cat(parts) if len(parts) > 1 else parts[0]
            restored = self.run_limited(stacked, limit or len(stacked)).to(image.device)
            done += len(chunk)
            if progress:
                progress(done, total)
            if total == 1:
                return restored
            if output is None:
                output = image.new_zeros(batch, restored.shape[1], *(length * scale for length in image.shape[2:]))
            for (row, column), part in zip(chunk, restored.tensor_split(len(chunk)), strict=True):
                weight = row.weights[:, None] * column.weights
                output[..., _output_place(row, scale), _output_place(column, scale)] += part * weight.to(image.device)
        assert output is not None  # there is a tile
        return output

    def run_limited(self, tiles: Tensor, limit: int) -> Tensor:
        """The outputs of tiles (N, C, h, w), at most ``limit`` of them at once."""
        if len(tiles) <= limit:
            return self.run(tiles)
        return torch.cat([self.run(some) for some in tiles.split(limit)])

    def run(self, tiles: Tensor) -> Tensor:
        """The outputs of tiles (N, C, h, w) on the model's device; again in float32 where they are not finite."""
        # A copy, as a model may write into its input.
        tiles = tiles.to(self.device, copy=True, memory_format=torch.channels_last)
        # no_grad and not inference_mode: callers may go on with the result in autograd.
        with torch.no_grad():
            output = self._in_precision(tiles, self.dtype)
            if output.isfinite().all():
                return output
            if self.dtype != torch.float32:
                name = str(self.dtype).removeprefix("torch.")
                warnings.warn(f"a tile came out non-finite in {name}, running it again in float32", stacklevel=2)
                output = self._in_precision(tiles, torch.float32)
                if output.isfinite().all():
                    return output
        raise ValueError("model must return finite values; got NaN or infinity in float32")

    def _in_precision(self, tiles: Tensor, dtype: torch.dtype) -> Tensor:
        model = self.model.in_dtype(dtype) if isinstance(self.model, Frozen) else self.model
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            if not self.self_ensemble:
                return self._forward(model, tiles)
            return sum(
                (_viewed(self._forward(model, _viewed(tiles, *view)), *view, undo=True) for view in _VIEWS[1:]),
                self._forward(model, tiles),
            ) / len(_VIEWS)

    def _forward(self, model: nn.Module, tiles: Tensor) -> Tensor:
        white, size = self.contract.value_range, tuple(tiles.shape[2:])
        if (larger := self.contract.sizes.containing(*size)) != size:
            tiles = pad_to_size(tiles, *larger)
        output = model(tiles * white, **self.arguments).float() / white
        if output.dim() != 4 or output.shape[2:] != tuple(self.scale * length for length in larger):
            raise ValueError(
                f"model must return (B, C, H, W) of {'the' if self.scale == 1 else f'{self.scale} times the'} input's "
                f"size; got {tuple(output.shape)} for {tuple(tiles.shape)}"
            )
        if larger != size:
            output = crop(output, *(self.scale * length for length in size))
        if self.contract.out_channels not in (None, output.shape[1]):
            raise ValueError(
                f"model must return the {self.contract.out_channels} channels of its contract; got {output.shape[1]}"
            )
        return output

    def with_less_memory(
        self, run: Callable[[T], Tensor], amount: T, less: Callable[[T], T | None], described: Callable[[T, T], str]
    ) -> Tensor:
        """``run(amount)``; where memory runs out again with ``less(amount)``, as long as that is not None."""
        while True:
            try:
                return run(amount)
            except RuntimeError as error:
                smaller = less(amount)
                if smaller is None or not _is_out_of_memory(error):
                    raise
            # Outside the handler, whose traceback keeps the failed attempt's tensors alive.
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            warnings.warn(f"out of memory{described(amount, smaller)}", stacklevel=2)
            amount = smaller


def _place(span: Span, scale: int) -> slice:
    return slice(span.start, span.start + len(span.weights) // scale)


def _output_place(span: Span, scale: int) -> slice:
    return slice(span.start * scale, span.start * scale + len(span.weights))


def _viewed(x: Tensor, transpose: bool, axes: tuple[int, ...], undo: bool = False) -> Tensor:
    if undo:
        x = x.flip(axes)
        return x.transpose(2, 3) if transpose else x
    return (x.transpose(2, 3) if transpose else x).flip(axes)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
