"""The side-by-side picture shows what it says."""

import numpy as np
import pytest

from ipt_fast.evaluation.figures import MARGIN, PANEL_WIDTH, detailed_box, image_grid, side_by_side, to_picture


def checkered(height=120, width=200, left=130, top=40, size=30):
    """Flat gray with one detailed square."""
    image = np.full((height, width, 3), 90, np.uint8)
    image[top : top + size, left : left + size : 2] = 250
    return image


def test_box_covers_the_most_detailed_part():
    left, top, width, height = detailed_box(checkered())
    assert width == 50 and height == 37
    assert left <= 130 and left + width >= 160 and top <= 40 and top + height >= 70


@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (500, 3), (40, 40), (11, 13, 1)])
def test_any_size_gives_a_picture_and_a_box_inside(shape):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    left, top, width, height = detailed_box(image)
    assert left >= 0 and top >= 0 and 1 <= width <= shape[1] - left and 1 <= height <= shape[0] - top
    assert side_by_side([("a", image)]).mode == "RGB"


def test_panels_stand_in_a_row_with_their_crops_below():
    dark, bright = np.zeros((100, 100, 3), np.uint8), np.full((100, 100, 3), 200, np.uint8)
    picture = np.asarray(
        side_by_side([("dark", dark), ("bright", bright)], captions=["", "1 dB"], zoom=(10, 20, 40, 30))
    )
    assert picture.shape[1] == 3 * MARGIN + 2 * PANEL_WIDTH
    for i, value in enumerate((0, 200)):
        x = MARGIN + i * (PANEL_WIDTH + MARGIN) + PANEL_WIDTH // 2
        column = picture[:, x]
        # 480 rows of the panel and 360 of its crop, less the frames around the box and the crop
        assert abs((column == value).all(1).sum() - 840) < 15


def test_captions_and_titles_are_drawn():
    image = np.full((20, 20, 3), 128, np.uint8)
    plain, titled, captioned = (
        np.asarray(side_by_side([(title, image)], captions=[caption]))
        for title, caption in (("", ""), ("Restored", ""), ("Restored", "31.02 dB"))
    )
    heads = [(each[:40] < 200).sum() for each in (plain, titled, captioned)]
    assert heads[0] < heads[1] < heads[2]
    assert (plain[60:] == captioned[60:]).all()


def test_to_picture():
    np.testing.assert_array_equal(to_picture(np.array([[-1.0, 0.5, 2.0]])), [[0, 128, 255]])
    np.testing.assert_array_equal(to_picture(np.array([[0, 257 * 7, 65535]], np.uint16)), [[0, 7, 255]])
    np.testing.assert_array_equal(to_picture(checkered()), checkered())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(panels=[]), "at least one"),
        (dict(panels=[("a", checkered()), ("b", checkered(60))]), "of one size"),
        (dict(panels=[("a", checkered())], captions=["x", "y"]), "one for each of 1 panels; got 2"),
        (dict(panels=[("a", checkered() / 255)]), "uint8"),
        (dict(panels=[("a", np.zeros((4, 4, 2), np.uint8))]), "1 or 3 channels; got 2"),
        (dict(panels=[("a", np.zeros((0, 4, 3), np.uint8))]), "not empty"),
        (dict(panels=[("a", checkered())], zoom=(190, 0, 20, 20)), "inside the 200 x 120 image"),
        (dict(panels=[("a", checkered())], zoom=(0, 0, 0, 20)), "inside"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        side_by_side(**arguments)


def test_a_grid_has_rows_of_images_of_one_size():
    images = [np.full((2, 3, 1), value, np.uint8) for value in (10, 20, 30)]
    picture = np.asarray(image_grid(images, 2, gap=1))
    assert picture.shape == (1 + 2 * 3, 1 + 2 * 4, 3)
    found = [picture[row, column].tolist() for row in (1, 4) for column in (1, 5)]
    assert found == [[10] * 3, [20] * 3, [30] * 3, [255] * 3]
    with pytest.raises(ValueError, match="images must be at least one, and of one size; got"):
        image_grid([images[0], images[0][:1]], 2)
    with pytest.raises(ValueError, match="images must be at least one"):
        image_grid([], 2)
