"""Image files: every kind comes back as it went in, and what cannot be kept is refused."""

import io
import struct
import sys
import zlib

import numpy as np
import PIL.Image
import pytest
from PIL import ImageCms, ImageOps, TiffImagePlugin
from PIL.TiffImagePlugin import IFDRational

from ipt_fast._files import atomic_write
from ipt_fast.data.io import Image, check_writable_as, from_pil, is_image_file, read_header, read_image, write_image

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
MAKE, ORIENTATION, EXIF_DIRECTORY, EXPOSURE_TIME, MAKER_NOTE = 0x010F, 0x0112, 0x8769, 0x829A, 0x927C


def pixels(channels=3, dtype=np.uint8, height=11, width=7):
    top = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(0, top, (height, width, channels), dtype, endpoint=True)


def exif_block(orientation=None):
    exif = PIL.Image.Exif()
    exif[MAKE] = "Maker"
    exif.get_ifd(EXIF_DIRECTORY).update({EXPOSURE_TIME: IFDRational(1, 100), MAKER_NOTE: b"opaque"})
    if orientation:
        exif[ORIENTATION] = orientation
    return exif.tobytes()


def assert_photo_exif(path):
    exif = PIL.Image.Exif()
    if path.suffix.lower() == ".tif" or path.suffix.lower() == ".tiff":  # Pillow opens no 16-bit gray with alpha
        with path.open("rb") as file:
            exif.load_from_fp(file)
            photo = exif.get_ifd(EXIF_DIRECTORY)
    else:
        with PIL.Image.open(path) as image:
            exif = image.getexif()
            photo = exif.get_ifd(EXIF_DIRECTORY)
    assert exif[MAKE] == "Maker" and exif.get(ORIENTATION, 1) == 1
    assert float(photo[EXPOSURE_TIME]) == pytest.approx(0.01) and photo[MAKER_NOTE] == b"opaque"


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def sixteen_bit_png(array, *chunks):
    height, width, channels = array.shape
    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    body = b"".join(png_chunk(*each) for each in (*chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + body


def tiff(array, tags):
    """An uncompressed 16-bit TIFF; ``tags`` are added to or replace those of the layout."""
    height, width, channels = array.shape
    directory = TiffImagePlugin.ImageFileDirectory_v2(prefix=b"II")
    layout = {
        256: width,
        257: height,
        258: (16,) * channels,
        259: 1,
        262: 2 if channels > 2 else 1,
        273: 0,
        277: channels,
    }
    for tag, value in (layout | {278: height, 279: array.nbytes} | tags).items():
        directory[tag] = value
    file = io.BytesIO()
    directory.save(file)
    return file.getvalue() + array.astype("<u2").tobytes()


@pytest.mark.parametrize(
    "dtype, channels, alpha",
    [(dtype, channels, alpha) for dtype in (np.uint8, np.uint16) for channels in (1, 3) for alpha in (False, True)],
)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF"])
def test_lossless_formats_keep_everything(tmp_path, suffix, alpha, channels, dtype):
    if dtype == np.uint16:
        pytest.importorskip("imagecodecs")
    profile = None if channels == 1 else ICC  # libpng refuses an RGB profile on gray
    image = Image(pixels(channels, dtype), pixels(1, dtype)[:, :, 0] if alpha else None, profile, exif_block())
    path = tmp_path / f"image{suffix}"
    write_image(path, image)
    again = read_image(path)
    assert again.pixels.dtype == dtype
    np.testing.assert_array_equal(again.pixels, image.pixels)
    np.testing.assert_array_equal(again.alpha, image.alpha)
    assert again.icc_profile == profile
    assert_photo_exif(path)
    write_image(path, again)
    assert_photo_exif(path)


@pytest.mark.parametrize("channels", [1, 3])
def test_tiff_is_read_by_others(tmp_path, channels):
    tifffile = pytest.importorskip("tifffile")
    for dtype in (np.uint8, np.uint16):
        array = pixels(channels, dtype, height=1501, width=803)  # of several strips
        path = tmp_path / f"{np.dtype(dtype).name}.tif"
        write_image(path, Image(array, None, bytes(100_000)))  # a profile that pushes the pixels beyond 64 KiB
        np.testing.assert_array_equal(tifffile.imread(path).reshape(array.shape), array)
        with tifffile.TiffFile(path) as file:
            assert len(file.pages[0].dataoffsets) > 1
    if channels == 3:  # of the last one Pillow knows no 16 bits
        with PIL.Image.open(tmp_path / "uint8.tif") as image:
            assert image.size == (803, 1501) and np.asarray(image).shape == (1501, 803, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_jpeg_keeps_profile_exif_and_kind(tmp_path, channels):
    path = tmp_path / "photo.jpg"
    smooth = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[:, None, None], (64, 48, channels))
    write_image(path, Image(smooth, None, ICC, exif_block()))
    again = read_image(path)
    assert again.pixels.shape == smooth.shape and again.icc_profile == ICC and again.exif == exif_block()
    assert np.abs(again.pixels.astype(int) - smooth).max() <= 4
    assert_photo_exif(path)


@pytest.mark.parametrize("alpha", [False, True])
def test_webp_is_written_lossless(tmp_path, alpha):
    image = Image(pixels(), pixels(1)[:, :, 0] if alpha else None, ICC, exif_block())
    write_image(tmp_path / "photo.webp", image)
    again = read_image(tmp_path / "photo.webp")
    np.testing.assert_array_equal(again.pixels, image.pixels)
    np.testing.assert_array_equal(again.alpha, image.alpha)
    assert again.icc_profile == ICC
    assert_photo_exif(tmp_path / "photo.webp")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_orientation_is_applied_and_reset(tmp_path, suffix, orientation):
    stored = PIL.Image.fromarray(np.kron(pixels(height=3, width=2), np.ones((16, 16, 1), np.uint8)))
    path = tmp_path / f"turned{suffix}"
    stored.save(path, exif=exif_block(orientation))
    upright = stored.copy()
    upright.getexif()[ORIENTATION] = orientation
    upright = ImageOps.exif_transpose(upright)
    image = read_image(path)
    assert image.pixels.shape[:2] == (upright.height, upright.width)
    assert np.abs(image.pixels.astype(int) - np.asarray(upright)).mean() < 5  # JPEG rounds
    write_image(path, image)
    assert_photo_exif(path)
    assert read_image(path).pixels.shape == image.pixels.shape


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_orientation(tmp_path, channels, suffix, orientation):
    pytest.importorskip("imagecodecs")
    stored, path = pixels(channels, np.uint16), tmp_path / f"turned{suffix}"
    exif = exif_block(orientation)
    if suffix == ".png":
        path.write_bytes(sixteen_bit_png(stored, (b"eXIf", exif.removeprefix(b"Exif\0\0"))))
    else:
        photo = {EXPOSURE_TIME: IFDRational(1, 100), MAKER_NOTE: b"opaque"}
        path.write_bytes(tiff(stored, {ORIENTATION: orientation, MAKE: "Maker", EXIF_DIRECTORY: photo}))
    half_turns = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1]}
    upright = half_turns.get(orientation)
    if upright is None:
        quarter_turns = {5: stored, 6: stored[::-1], 7: stored[::-1, ::-1], 8: stored[:, ::-1]}
        upright = quarter_turns[orientation].swapaxes(0, 1)
    image = read_image(path)
    np.testing.assert_array_equal(image.pixels, upright)
    write_image(path, image)
    np.testing.assert_array_equal(read_image(path).pixels, upright)
    assert_photo_exif(path)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (4, 4)])
def test_views_of_sixteen_bits_are_written(tmp_path, shape, channels, suffix):
    pytest.importorskip("imagecodecs")
    large = pixels(6, np.uint16)
    for view in (
        large[: shape[0], : shape[1], :channels],
        large[::-2, ::2, ::2][: shape[0], : shape[1], :channels],
        np.broadcast_to(large[:1, :1, :channels], (*shape, channels)),
        large[: shape[0], : shape[1], 0, None],
    ):
        write_image(tmp_path / f"a{suffix}", Image(view))
        np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}").pixels, view)


def test_sixteen_bit_colour_is_not_read_as_eight(tmp_path):
    pytest.importorskip("imagecodecs")
    array = pixels(4, np.uint16)
    (tmp_path / "a.png").write_bytes(sixteen_bit_png(array))
    image = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(np.dstack([image.pixels, image.alpha]), array)


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".bmp"])
def test_sixteen_bit_is_never_reduced(tmp_path, suffix):
    with pytest.raises(ValueError, match="for an image of 16 bits; got"):
        write_image(tmp_path / f"a{suffix}", Image(pixels(3, np.uint16)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".jpeg", ".bmp"])
def test_alpha_needs_a_format_that_holds_it(tmp_path, suffix):
    with pytest.raises(ValueError, match="for an image with alpha; got"):
        write_image(tmp_path / f"a{suffix}", Image(pixels(), pixels(1)[:, :, 0]))


def test_sixteen_bit_gray_with_alpha(tmp_path):
    pytest.importorskip("imagecodecs")
    (tmp_path / "a.png").write_bytes(sixteen_bit_png(pixels(2, np.uint16)))
    image = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(np.dstack([image.pixels, image.alpha]), pixels(2, np.uint16))


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_transparent_colour_becomes_alpha(tmp_path, channels):
    pytest.importorskip("imagecodecs")
    array = pixels(channels, np.uint16)
    colour = array[2, 3]
    (tmp_path / "a.png").write_bytes(sixteen_bit_png(array, (b"tRNS", colour.astype(">u2").tobytes())))
    image = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(image.pixels, array)
    np.testing.assert_array_equal(image.alpha, np.where((array == colour).all(2), 0, 65535))


def test_palette_and_one_bit_are_converted(tmp_path):
    colour = PIL.Image.fromarray(pixels())
    palette = colour.quantize(8)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_image(tmp_path / "p.png").pixels, np.asarray(palette.convert("RGB")))
    palette.save(tmp_path / "t.png", transparency=0)
    image = read_image(tmp_path / "t.png")
    np.testing.assert_array_equal(image.alpha == 0, np.asarray(palette) == 0)
    bits = PIL.Image.fromarray(pixels(1)[:, :, 0] > 100)
    bits.save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_image(tmp_path / "1.png").pixels[:, :, 0], np.asarray(bits) * 255)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_transparent_gray_of_any_depth_becomes_alpha(tmp_path, bits):
    white = 2**bits - 1
    values = np.random.default_rng(0).integers(0, white, (9, 16), np.uint8, endpoint=True)
    for gray in {0, 1, white}:
        rows = np.unpackbits(values[:, :, None], axis=2)[:, :, 8 - bits :].reshape(9, -1)
        body = b"".join(b"\0" + row.tobytes() for row in np.packbits(rows, axis=1))
        header = struct.pack(">IIBBBBB", 16, 9, bits, 0, 0, 0, 0)
        content = [
            (b"IHDR", header),
            (b"tRNS", struct.pack(">H", gray)),
            (b"IDAT", zlib.compress(body)),
            (b"IEND", b""),
        ]
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*each) for each in content))
        image = read_image(tmp_path / "a.png")
        np.testing.assert_array_equal(image.pixels[:, :, 0], values * (255 // white))
        np.testing.assert_array_equal(image.alpha, np.where(values == gray, 0, 255))


def test_other_modes_are_refused(tmp_path):
    PIL.Image.new("CMYK", (4, 4)).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg.*mode must be .*; got CMYK"):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg.*mode must be .*; got CMYK"):
        read_header(tmp_path / "a.jpg")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "suffix, dtype",
    [(".png", np.uint8), (".png", np.uint16), (".tif", np.uint8), (".tif", np.uint16), (".jpg", np.uint8)],
)
def test_truncated_file_is_named(tmp_path, suffix, dtype):
    if dtype == np.uint16:
        pytest.importorskip("imagecodecs")
    path = tmp_path / f"cut{suffix}"
    write_image(path, Image(pixels(3, dtype, 200, 200)))
    data = path.read_bytes()
    for length in (len(data) * 2 // 3, 30, 0):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"cannot read image .*cut{suffix}"):
            read_image(path)


def test_without_the_extra_sixteen_bit_names_it(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(sixteen_bit_png(pixels(3, np.uint16)))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ImportError, match=r"pip install ipt-fast\[io\]"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_damaged_sixteen_bit_file_is_one_sentence(tmp_path, capfd, suffix):
    pytest.importorskip("imagecodecs")
    path = tmp_path / f"hurt{suffix}"
    write_image(path, Image(pixels(3, np.uint16, 200, 200)))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"cannot read image .*hurt{suffix}: .*(broken|damaged)"):
        read_image(path)
    assert capfd.readouterr() == ("", "")  # the libraries print nothing in front of it


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_header_without_decoding(tmp_path, suffix, dtype):
    path = tmp_path / f"a{suffix}"
    if dtype == np.uint16:
        pytest.importorskip("imagecodecs")
    write_image(path, Image(pixels(3, dtype)))
    assert read_header(path) == (11, 7, dtype)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=rf"cannot read image .*a{suffix}"):
        read_header(path)


def test_hidden_files_and_folders_are_no_image_files(tmp_path):
    (tmp_path / "a.png").touch()
    (tmp_path / "._a.png").touch()
    (tmp_path / "a.txt").touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in tmp_path.iterdir() if is_image_file(path)] == ["a.png"]


def test_missing_file_non_image_and_animation(tmp_path):
    with pytest.raises(ValueError, match=r"none\.png"):
        read_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png"):
        read_image(tmp_path / "text.png")
    frame = PIL.Image.fromarray(pixels())
    frame.save(tmp_path / "pages.tif", save_all=True, append_images=[frame])
    with pytest.raises(ValueError, match=r"pages\.tif: it must have one frame or page; got 2"):
        read_image(tmp_path / "pages.tif")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".bmp", ".webp"])
def test_too_many_pixels_are_refused_unless_they_are_allowed(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"big{suffix}"
    write_image(path, Image(pixels(1)))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 30)
    for function in (read_image, read_header):
        with pytest.raises(ValueError, match=rf"big\{suffix}: it must have at most max_pixels = 60 pixels; got 7 x 11"):
            function(path)
        with pytest.raises(ValueError, match="at most max_pixels = 76 pixels"):
            function(path, max_pixels=76)
        function(path, max_pixels=77)
    assert read_image(path, max_pixels=77).pixels.shape[:2] == (11, 7)


@pytest.mark.parametrize(
    "name, width, scale",
    [("a.webp", 16384, 1), ("a.jpg", 65501, 1), ("a.JPEG", 65501, 1), ("a.webp", 8192, 2), ("a.jpg", 21834, 3)],
)
def test_sizes_that_a_format_does_not_hold_are_told_first(tmp_path, name, width, scale):
    for array in (np.zeros((2, width, 3), np.uint8), np.zeros((width, 2, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"path must end in \.png, .* for an image of \d+ x \d+ pixels; got .*a\."):
            check_writable_as(tmp_path / name, Image(array), scale)
        smaller = array[: array.shape[0] - scale, : array.shape[1] - scale]
        check_writable_as(tmp_path / name, Image(smaller if 0 not in smaller.shape else array[:1, :9]), scale)
    with pytest.raises(ValueError, match="for an image of"):
        write_image(tmp_path / name, Image(np.zeros((1, width * scale, 1), np.uint8)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name, width", [("a.webp", 16383), ("a.jpg", 65500), ("a.png", 70000), ("a.tif", 70000)])
def test_the_largest_sizes_are_written(tmp_path, name, width):
    write_image(tmp_path / name, Image(np.zeros((1, width, 1), np.uint8)))
    assert read_image(tmp_path / name).pixels.shape[:2] == (1, width)


def test_a_bitmap_over_4_gigabytes_is_told_first(tmp_path):
    huge = np.broadcast_to(np.zeros((1, 1, 3), np.uint8), (40_000, 40_000, 3))
    with pytest.raises(ValueError, match="for an image of 40000 x 40000 pixels"):
        check_writable_as(tmp_path / "a.bmp", Image(huge))
    check_writable_as(tmp_path / "a.bmp", Image(huge[:30_000]))


@pytest.mark.parametrize("stem", ["n" * 251, "\u00e4" * 125 + "n", "a." + "n" * 249])
def test_names_as_long_as_the_file_system_allows(tmp_path, stem):
    write_image(tmp_path / f"{stem}.png", Image(pixels()))
    assert read_image(tmp_path / f"{stem}.png").pixels.shape == (11, 7, 3)
    assert [path.stem for path in tmp_path.iterdir()] == [stem]
    with atomic_write(tmp_path / ("n." + "s" * 253)) as temporary:
        temporary.touch()
    for function in (write_image, check_writable_as):
        with pytest.raises(ValueError, match="path must have a name of at most 255 bytes; got .*nn.png"):
            function(tmp_path / f"{stem}n.png", Image(pixels()))


def test_write_refuses_unknown_suffix_and_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match="path must end in"):
        write_image(tmp_path / "a.gif", Image(pixels()))
    with pytest.raises(OSError):
        write_image(tmp_path / "missing" / "a.png", Image(pixels()))
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_image(path, Image(pixels()))
    before = path.read_bytes()
    monkeypatch.setattr(PIL.Image.Image, "save", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_image(path, Image(255 - pixels()))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_foreign_exif_cannot_break_a_tiff(tmp_path):
    exif = PIL.Image.Exif()
    exif[256], exif[257], exif[MAKE] = 9999, 9999, "Maker"  # some cameras store the picture's size here
    write_image(tmp_path / "a.tif", Image(pixels(), None, None, exif.tobytes()))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, pixels())


def test_from_pil_gives_writable_copies():
    source = PIL.Image.fromarray(pixels())
    image = from_pil(source)
    image.pixels[:] = 0
    np.testing.assert_array_equal(np.asarray(source), pixels())
