"""Pictures of what an IPT has learned: how alike its positions, and its tasks, are (supplement, figures 1 and 3)."""

from collections.abc import Sequence

import numpy as np
import PIL.Image
from PIL import ImageDraw, ImageFont
from torch import Tensor

from ..models._pretrained import PretrainedModel
from .figures import BACKGROUND, FAINT_INK, INK, MARGIN

CELL = 4  # pixels for each position in a map of a position
# Dark blue, teal, yellow: as light as they are large, also in print and to colour-blind eyes.
_COLOURS = np.array([(0.267, 0.005, 0.329), (0.128, 0.567, 0.551), (0.993, 0.906, 0.144)])


def position_similarity(model: PretrainedModel) -> np.ndarray:
    """(N, N): the cosine of every two position embeddings of an IPT.

    Raises:
        ValueError: the model has none.
    """
    positions = model.position_embedding()
    if positions is None:
        raise ValueError(f"model must have position embeddings; got {type(model).__name__}, which has none")
    return _cosines(positions)


def task_similarity(model: PretrainedModel) -> dict[str, np.ndarray]:
    """{task: (N, N)}: the cosine of every two patches' embeddings of each task of an IPT.

    Raises:
        ValueError: the model has none.
    """
    tasks = model.task_embeddings()
    if not tasks:
        raise ValueError(f"model must have task embeddings; got {type(model).__name__}, which has none")
    return {task: _cosines(embedding) for task, embedding in tasks.items()}


def _cosines(embeddings: Tensor) -> np.ndarray:
    vectors = embeddings.detach().double().cpu().numpy()
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors @ vectors.T


def draw_positions(model: PretrainedModel) -> PIL.Image.Image:
    """Figure 1: for every position of the grid of patches a map of its likeness to all, at its place."""
    similarity = position_similarity(model)
    side = round(len(similarity) ** 0.5)
    gap, cell = 2, side * CELL
    canvas = np.full((side * (cell + gap), side * (cell + gap), 3), 255, np.uint8)
    for index, row in enumerate(similarity):
        y, x = (place * (cell + gap) for place in divmod(index, side))
        tile = _coloured(row.reshape(side, side)).repeat(CELL, 0).repeat(CELL, 1)
        canvas[y : y + cell, x : x + cell] = tile
    return _titled([("Cosine similarity of position embeddings", canvas)])


def draw_tasks(model: PretrainedModel) -> PIL.Image.Image:
    """Figure 3: for every task a map of the likeness of its patches' embeddings, patch by patch."""
    panels = []
    for task, similarity in task_similarity(model).items():
        factor = max(1, 360 // len(similarity))
        panels.append((task, _coloured(similarity).repeat(factor, 0).repeat(factor, 1)))
    return _titled(panels)


def _coloured(values: np.ndarray) -> np.ndarray:
    """Values from -1 to 1 as colours."""
    place = (np.clip(values, -1, 1) + 1)[..., None]
    low, high = np.minimum(place, 1), np.maximum(place - 1, 0)
    colours = _COLOURS[0] + low * (_COLOURS[1] - _COLOURS[0]) + high * (_COLOURS[2] - _COLOURS[1])
    return np.rint(255 * colours).astype(np.uint8)


def _titled(panels: Sequence[tuple[str, np.ndarray]]) -> PIL.Image.Image:
    """Panels in a row, their titles above and the scale of colours below."""
    font, line = ImageFont.load_default(size=18), 30
    width = MARGIN + sum(pixels.shape[1] + MARGIN for _, pixels in panels)
    height = max(pixels.shape[0] for _, pixels in panels)
    canvas = PIL.Image.new("RGB", (max(width, 480), height + 2 * line + 3 * MARGIN), BACKGROUND)
    draw, x = ImageDraw.Draw(canvas), MARGIN
    for title, pixels in panels:
        draw.text((x, MARGIN), title, INK, font)
        canvas.paste(PIL.Image.fromarray(pixels), (x, MARGIN + line))
        x += pixels.shape[1] + MARGIN
    y = height + line + 2 * MARGIN
    scale = _coloured(np.linspace(-1, 1, 200))[None].repeat(14, 0)
    canvas.paste(PIL.Image.fromarray(scale), (MARGIN + 30, y + 5))
    draw.text((MARGIN, y), "-1", FAINT_INK, font)
    draw.text((MARGIN + 240, y), "1", FAINT_INK, font)
    return canvas
