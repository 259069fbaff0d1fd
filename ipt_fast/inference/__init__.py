"""Restoring images of any kind and size with a model: tiles, blending, self-ensemble, half precision.

An image becomes a batch (``_images``), a plan cuts it into tiles (``_plan``), the model runs on these (``_runner``).
"""

# What is imported ``as`` itself is not used here, but was importable from here before.
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import _extension
from .._device import usable_device
from .._precision import usable_dtype
from ..data import io as io
from ..data.resize import imresize as imresize
from ..freezing import Frozen, prepared
from ..models.contract import Contract, attached_config, describe, describe_restoring
from ..models.described import as_module
from ..modules.feed_forward import reason_against_merging as reason_against_merging
from ..modules.padding import crop, pad_to_size
from ..ops._explain import explain
from ..ops._select import policy
from ..tiling import BLENDS, PROCEDURES, available_memory, balanced_tile, largest_tile, official_end
from ..tiling import blend_weights as blend_weights
from ..tiling import procedure_tiles as procedure_tiles
from ..tiling import tile_limit as tile_limit
from ..tiling import tile_starts as tile_starts
from ._images import ImageT, as_batch, magnified_alpha
from ._plan import SMALLEST_RETRY as SMALLEST_RETRY
from ._plan import TileSize, plan_procedure
from ._runner import Runner

SMALLEST_TILE = 16
DEFAULT_OVERLAP = 32
TILES_AT_ONCE = 32  # of a model with one size of input


def restore(
    image: ImageT,
    model: Any,
    *,
    task: str | int | None = None,
    tile: int | str | None = "auto",
    overlap: int | None = None,
    blend: str = "cosine",
    self_ensemble: bool = False,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
) -> ImageT:
    """Restore one image (or a batch) with ``model``, which is left as it is.

    Args:
        image: a PIL image, an (H, W) or (H, W, C) array of uint8, uint16 or floats in [0, 1], or a (B, C, H, W) tensor
            of floats in [0, 1]. Noise may take floats out of that range. PIL modes are L, LA, RGB, RGBA and I;16; mode
            1 is taken as L and P as RGB or RGBA. Alpha is kept as it is, or enlarged bicubically; colours that it hides
            are first taken from the visible pixels near them. Gray into a model of 3 channels runs as three equal
            channels and gives back their mean.
        model, task, tile, overlap, blend, self_ensemble, dtype, device: see :class:`Restorer`, which saves preparing
            the model again for each of many images.

    Returns:
        The same kind, dtype and range: integers are rounded (half to even) and clipped, floats are not clipped. The
        number of channels is the model's, which differs from the image's for two views in 6 channels.

    Raises:
        TypeError: ``image`` is of another kind or dtype.
        ValueError: a bad argument, an empty image, NaN or infinity in it, floats in 0..255 or dark ones in
            [-1, 1], channels the model does not take, or an output that is not finite even in float32.
    """
    restorer = Restorer(
        model,
        task=task,
        tile=tile,
        overlap=overlap,
        blend=blend,
        self_ensemble=self_ensemble,
        dtype=dtype,
        device=device,
    )
    return restorer(image)


class Restorer:
    """A model made ready for inference: a frozen copy, called on images as :func:`restore` takes them.

    Args:
        model: a module (B, C, H, W) -> (B, C', H, W), frozen or not, or a descriptor of spandrel. Its
            :class:`ipt_fast.models.Contract` says what it takes: of one that carries none
            :func:`ipt_fast.models.describe` finds out, and where nothing is said it gets the image's channels as they
            are, with values in [0, 1].
        task: name or number of one of the model's tasks, which may magnify; None where there is one or none.
        tile: None runs the image whole. A number of pixels, at least 16 and not necessarily a multiple of anything,
            cuts it into square tiles of exactly this size, or of the next larger one that the model takes, moved
            together so that all lie inside. "auto" takes the whole image, or as few equal tiles as half of the
            available memory allows (limit 512 for a model whose memory is not known). Attention that spans the whole
            image sees only its tile, so tiles change the result a little, and not only at the seams. A model with one
            size of input (``image_size``) gets tiles of that size, joined as ``tile`` says: "blend" (the same as
            "auto"), "paper" or "official", see :func:`ipt_fast.tiling.procedure_tiles`; smaller images are padded.
        overlap: pixels that neighbouring tiles share at least; at most half of ``tile``, 32 where that fits.
        blend: "cosine" fades tiles into each other, "average" weighs all that cover a pixel equally.
        self_ensemble: the mean over the 8 flips and transposes of each tile; 8 times the work.
        dtype: torch.float32, bfloat16 or float16, or their names. Half precision runs under autocast, so the input and
            everything autocast deems delicate stay in float32. "auto" takes half precision on a GPU, and bfloat16 on a
            CPU with instructions for it, where the model's contract allows that; a frozen model keeps its own. A tile
            that comes out non-finite is run again in float32, with a warning.
        device: where to run; the model's own by default.
        progress: called as ``progress(done, total)`` after each tile.

    The attribute ``model`` is that copy, see :func:`ipt_fast.freeze`. Where several restorers share a machine,
    ``memory_share`` is the part of the available memory that this one's tiles may count on, 1 by default.

    When memory runs out the image is started again with half the tile, with a warning, down to 128 pixels.

    Raises:
        ValueError, TypeError: a bad argument.
    """

    memory_share = 1.0

    def __init__(
        self,
        model: Any,
        *,
        task: str | int | None = None,
        tile: int | str | None = "auto",
        overlap: int | None = None,
        blend: str = "cosine",
        self_ensemble: bool = False,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        model = as_module(model)
        if not isinstance(self_ensemble, bool):
            raise TypeError(f"self_ensemble must be True or False; got {self_ensemble!r}")
        contract, name = describe_restoring(model), type(model).__name__
        _check_tile(tile, overlap, blend, contract, name)
        if task is not None and not contract.takes_task:
            raise ValueError(f"task must be None for {name}, which has no tasks; got {task!r}")
        self.task, self.tile, self.overlap, self.blend, self.self_ensemble = task, tile, overlap, blend, self_ensemble
        self.scale = contract.scale(task)
        self.device = _usable_device(device, model)
        if dtype == "auto" and isinstance(model, Frozen):
            dtype = model.dtype
        if dtype == "auto" and any(".quantized" in type(module).__module__ for module in model.modules()):
            dtype = torch.float32  # PyTorch's quantised layers take no other
        self.dtype = _usable_dtype(dtype, self.device, contract)
        self.model: nn.Module = Frozen(prepared(model, self.device), self.dtype)
        self.contract = describe(self.model)
        self.progress = progress

    @property
    def config(self) -> Any:
        """That of the prepared model; None of one that has none."""
        return attached_config(self.model)

    @property
    def image_size(self) -> int | None:
        return self.contract.image_size

    @property
    def value_range(self) -> float:
        return self.contract.value_range

    @property
    def arguments(self) -> dict[str, Any]:
        """What the model gets beside images."""
        return {} if self.task is None else {"task": self.task}

    @property
    def _runner(self) -> Runner:
        """As the attributes are now: a program may set them between two images."""
        return Runner(
            self.model,
            self.contract,
            scale=self.scale,
            arguments=self.arguments,
            device=self.device,
            dtype=self.dtype,
            self_ensemble=self.self_ensemble,
        )

    def __call__(self, image: ImageT) -> ImageT:
        batch, back = as_batch(image)
        takes = self.contract.in_channels
        gray_as_colour = batch.shape[1] == 1 and takes == 3
        if gray_as_colour:
            batch = batch.expand(-1, 3, -1, -1)
        elif takes not in (None, batch.shape[1]):
            raise ValueError(f"image must have {takes} channels for this model; got {batch.shape[1]}")
        output = self._restore_any_size(batch) if self.contract.image_size is None else self._restore_one_size(batch)
        return back(output.mean(1, keepdim=True) if gray_as_colour else output)

    def try_one_pixel(self) -> None:
        """Restore one pixel: a backend that cannot run is a wrong call, and not the failure of each of many images."""
        self(np.zeros((1, 1, self.contract.in_channels or 1), np.float32))

    def magnify_alpha(self, alpha: np.ndarray | None) -> np.ndarray | None:
        """An alpha channel (H, W), or None, for the image that the model returns: resized bicubically."""
        return magnified_alpha(alpha, self.scale)

    def _restore_any_size(self, image: Tensor) -> Tensor:
        """(B, C, H, W) float32 on any device -> the same, not clipped."""
        runner = self._runner

        def run(size: TileSize) -> Tensor:
            plan = size.plan(image.shape[2], image.shape[3], self.blend, self.scale)
            return runner.run_plan(image, plan, progress=self.progress)

        return runner.with_less_memory(
            run,
            self._tile_size(image),
            TileSize.halved,
            lambda size, smaller: f" with tiles of {size} pixels, trying {smaller}",
        )

    def _restore_one_size(self, image: Tensor) -> Tensor:
        """The same with a model of one size of input, whose tiles lie as a procedure says."""
        size, scale, runner = self.contract.image_size, self.scale, self._runner
        assert size is not None
        procedure = str(self.tile) if self.tile != "auto" else "blend" if self.blend == "cosine" else "paper"
        height, width = image.shape[2:]
        padded = pad_to_size(image, max(height, size), max(width, size))
        plan = plan_procedure(procedure, padded.shape[2], padded.shape[3], size, scale)

        def run(limit: int) -> Tensor:
            at_once = max(1, limit // max(1, len(image)))
            output = runner.run_plan(padded, plan, at_once=at_once, limit=limit, progress=self.progress)
            if procedure == "official":  # has the left border as wide as a tile, which shows where it meets the top
                corner = runner.run_limited(padded[..., :size, :size], limit).to(output.device)
                bottom, right = size // 4 * scale, official_end(padded.shape[3], size, scale)
                output[..., :bottom, :right][..., : corner.shape[3]] = corner[..., :bottom, :right]
            return output

        output = runner.with_less_memory(
            run,
            TILES_AT_ONCE,
            lambda limit: None if limit == 1 else limit // 2,
            lambda _, smaller: f", trying {smaller} tiles at once",
        )
        return crop(output, height * scale, width * scale)

    def _tile_size(self, image: Tensor) -> TileSize:
        """The tiles for an image: none is larger than it."""
        batch, _, height, width = image.shape
        if self.tile is None or self.tile == "auto" and self.contract.whole:
            limit = max(height, width)
        elif self.tile == "auto":
            available, fused = int(self.memory_share * available_memory(self.device)), self._layers_are_fused()
            if self.device.type == "cpu":  # the joined output is yet to come, and lies where the image does
                channels = self.contract.out_channels or image.shape[1]
                output = image.element_size() * batch * channels * height * width * self.scale**2
                available = max(0, available - output)
            limit = largest_tile(self.contract.memory, available, batch, fused)
            if self.overlap is not None:
                limit = max(limit, 2 * self.overlap)
        else:
            limit = int(self.tile)
        overlap = min(DEFAULT_OVERLAP, limit // 4) if self.overlap is None else self.overlap
        if self.tile == "auto":
            tile = balanced_tile(height, limit, overlap), balanced_tile(width, limit, overlap)
        else:
            tile = min(height, limit), min(width, limit)
        tile = self.contract.sizes.containing(*tile)
        return TileSize(min(height, tile[0]), min(width, tile[1]), overlap)

    def _layers_are_fused(self) -> bool:
        fused = self.device.type == "cpu" and policy() in ("auto", "cpu") and _extension.load()
        return fused and not any(explain(self.model).values())


def _check_tile(tile: object, overlap: object, blend: object, contract: Contract, name: str) -> None:
    size = contract.image_size
    if size:
        _check_procedure(tile, overlap, name, size)
    elif not (tile is None or tile == "auto" or (type(tile) is int and tile >= SMALLEST_TILE)):
        raise ValueError(f'tile must be "auto", None or an int of at least {SMALLEST_TILE}; got {tile!r}')
    if overlap is not None:
        if type(overlap) is not int or overlap < 0:
            raise ValueError(f"overlap must be None or an int of at least 0; got {overlap!r}")
        if type(tile) is int and overlap > tile // 2:
            raise ValueError(f"overlap must be at most half of the tile, {tile // 2}; got {overlap}")
    if blend not in BLENDS:
        raise ValueError(f"blend must be one of {', '.join(BLENDS)}; got {blend!r}")
    if size and tile == "blend" and blend == "average":
        raise ValueError('blend must be "cosine" where tile is "blend", as tile="paper" is the average; got "average"')


def _check_procedure(tile: object, overlap: object, name: str, size: int) -> None:
    if tile != "auto" and tile not in PROCEDURES:
        names = ", ".join(PROCEDURES)
        raise ValueError(f"tile must be auto, {names} for {name}, whose input has {size} x {size} pixels; got {tile!r}")
    if tile == "official" and size % 4:
        raise ValueError(
            f"tile must be auto, blend or paper where 4 does not divide the input's {size} pixels; got official"
        )
    if overlap is not None:
        raise ValueError(f"overlap must be None for {name}, whose tiles lie where `tile` says; got {overlap!r}")


def _usable_dtype(dtype: torch.dtype | str, device: torch.device, contract: Contract) -> torch.dtype:
    found = usable_dtype(dtype, device)
    if found in contract.dtypes or not (isinstance(dtype, str) and dtype == "auto"):
        return found
    half_instead = device.type == "cuda" and torch.float16 in contract.dtypes
    return torch.float16 if half_instead else torch.float32


def _usable_device(device: torch.device | str | None, model: nn.Module) -> torch.device:
    if device is None and isinstance(model, Frozen):
        return model.device
    if device is None:
        parameter = next(model.parameters(), None)
        if parameter is not None and parameter.is_meta:
            raise ValueError("model must have its weights in memory; got the meta device (offloaded, not loaded)")
        return torch.device("cpu") if parameter is None else parameter.device
    return usable_device(device)
