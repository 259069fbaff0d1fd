"""Files that are sound but unusual are read; damaged ones and those that hold another picture are refused."""

import io
import struct
import zlib

import numpy as np
import PIL.Image
import pytest
from PIL import PngImagePlugin

from ipt_fast.data.io import Image, read_header, read_image, write_image

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
LARGE = np.random.default_rng(1).bytes(1_500_000)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_profiles_of_more_than_a_megabyte_are_read_from_png(tmp_path, dtype):
    if dtype == np.uint16:
        pytest.importorskip("imagecodecs")
    limits = PIL.Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
    write_image(tmp_path / "a.png", Image(PIXELS.astype(dtype), icc_profile=LARGE))
    image = read_image(tmp_path / "a.png")
    assert image.icc_profile == LARGE and read_header(tmp_path / "a.png")[:2] == (12, 20)
    np.testing.assert_array_equal(image.pixels, PIXELS)
    assert limits == (PIL.Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name, data", [
    (b"zTXt", b"parameters\0\0" + zlib.compress(b"p" * 1_500_000)),
    (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b"<x:xmpmeta/>".ljust(1_500_000))),
])  # fmt: skip
def test_texts_of_more_than_a_megabyte_are_read_from_png(tmp_path, name, data, late):
    content = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(content, "PNG")
    content = content.getvalue()
    place = len(content) - 12 if late else 33
    (tmp_path / "a.png").write_bytes(content[:place] + chunk(name, data) + content[place:])
    image = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(image.pixels, PIXELS)
    assert image.xmp is None if name == b"zTXt" else len(image.xmp) == 1_500_000
    write_image(tmp_path / "out.png", image)
    assert read_image(tmp_path / "out.png").xmp == image.xmp


@pytest.mark.parametrize("suffix, bytes_", [(".png", 1 << 26), (".jpg", 255 * 65519)])
def test_profiles_that_a_format_does_not_hold_are_named(tmp_path, monkeypatch, suffix, bytes_):
    with pytest.warns(UserWarning, match=rf"not kept in a .* file: ICC profile over {round(bytes_ / 1024)} KB$"):
        write_image(tmp_path / f"out{suffix}", Image(PIXELS, icc_profile=bytes(bytes_ + 1)))
    assert read_image(tmp_path / f"out{suffix}").icc_profile is None


def test_a_profile_made_to_fill_the_memory_is_refused(tmp_path):
    content = io.BytesIO()
    PIL.Image.fromarray(PIXELS).save(content, "PNG")
    content, bomb = content.getvalue(), b"p\0\0" + zlib.compress(bytes((1 << 26) + 1))
    (tmp_path / "a.png").write_bytes(content[:33] + chunk(b"iCCP", bomb) + content[33:])
    with pytest.raises(ValueError, match=r"cannot read image .*a\.png: "):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("place", [40, -20])
def test_wrong_checksums_of_sixteen_bits_are_refused(tmp_path, place):
    pytest.importorskip("imagecodecs")
    write_image(tmp_path / "a.png", Image(PIXELS.astype(np.uint16), icc_profile=LARGE[:99]))
    content = bytearray((tmp_path / "a.png").read_bytes())
    content[place] ^= 1
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.png: "):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("marked, reason", [
    (0, r"its page must be its largest picture; got 10 x 6, and one of 20 x 12"),
    (1, r"it must have a page that is not marked as a smaller copy; got one of 20 x 12"),
])  # fmt: skip
def test_a_picture_behind_its_preview_is_refused(tmp_path, marked, reason):
    tifffile = pytest.importorskip("tifffile")
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(PIXELS[::2, ::2], photometric="rgb", subifds=1, subfiletype=marked)
        file.write(PIXELS, photometric="rgb")
    for function in (read_image, read_header):
        with pytest.raises(ValueError, match=rf"a\.tif: {reason}"):
            function(tmp_path / "a.tif")


def test_a_page_of_a_larger_picture_that_is_not_there_is_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", PIXELS, photometric="rgb", subfiletype=1)
    with pytest.raises(ValueError, match="it must have a page that is not marked as a smaller copy; got none"):
        read_image(tmp_path / "a.tif")


def test_a_palette_of_another_size_is_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    palette = np.zeros((3, 256), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", PIXELS[:, :, 0], photometric="palette", colormap=palette)
    content = (tmp_path / "a.tif").read_bytes()
    entry = struct.pack("<HHL", 320, 3, 768)
    assert content.count(entry) == 1
    for count in (1, 9, 384, 767):
        (tmp_path / "a.tif").write_bytes(content.replace(entry, struct.pack("<HHL", 320, 3, count)))
        with pytest.raises(ValueError, match=r"a\.tif: (its palette must have 3 x 256 numbers|it is damaged)"):
            read_image(tmp_path / "a.tif")


def test_damaged_avif_is_one_sentence(tmp_path):
    content = io.BytesIO()
    try:
        PIL.Image.fromarray(PIXELS).save(content, "AVIF")
    except KeyError:
        pytest.skip("this Pillow has no AVIF")
    random, refused = np.random.default_rng(0), 0
    for _ in range(60):
        hurt = bytearray(content.getvalue())
        for place in random.integers(12, len(hurt), 3):
            hurt[place] = random.integers(256)
        (tmp_path / "a.avif").write_bytes(hurt)
        try:
            read_image(tmp_path / "a.avif")
        except ValueError as error:
            assert "a.avif: " in str(error)
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("max_pixels", [0, -5])
def test_a_limit_below_one_pixel_is_a_wrong_call(tmp_path, max_pixels):
    PIL.Image.fromarray(PIXELS).save(tmp_path / "a.png")
    for function in (read_image, read_header):
        with pytest.raises(ValueError, match=f"^max_pixels must be None or at least 1; got {max_pixels}$"):
            function(tmp_path / "a.png", max_pixels)
