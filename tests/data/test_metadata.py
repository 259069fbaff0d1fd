"""What describes a photo: kept and true, or dropped with a warning that names it."""

import dataclasses
import io
import struct
import warnings
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from PIL import ImageCms, TiffImagePlugin
from torch import nn

from ipt_fast.data.io import Image, read_image, write_image
from ipt_fast.inference import restore
from ipt_fast.models.contract import Contract

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6" tiff:ImageWidth="7">'
    b"<exif:PixelYDimension>11</exif:PixelYDimension><dc:title>Orientation</dc:title></rdf:Description></x:xmpmeta>"
)
IPTC = b"\x1c\x02\x05\x00\x05Title"
LOSSLESS = (".png", ".tif", ".webp")
SOURCE_SIZE = (11, 7)  # height, width


def pixels(dtype=np.uint8, channels=3):
    top = np.iinfo(dtype).max
    return np.random.default_rng(0).integers(0, top, (*SOURCE_SIZE, channels), dtype, endpoint=True)


def exif_block(order="<", orientation=6, thumbnail=b"\xff\xd8small\xff\xd9", extra=b""):
    """A camera's block: sizes in three directories, a resolution, notes with places in the block, and a thumbnail."""
    main = [(0x0100, 3, 1, 7), (0x0101, 4, 1, 11), (0x0112, 3, 1, orientation), (0x011A, 5, 1, "across"),
            (0x011B, 5, 1, "down"), (0x0128, 3, 1, 2), (0x8769, 4, 1, "exif")]  # fmt: skip
    exif = [(0x927C, 7, 20, "notes"), (0xA002, 3, 1, 7), (0xA003, 4, 1, 11), (0xA005, 4, 1, "interoperability")]
    interoperability = [(0x1001, 3, 1, 7), (0x1002, 3, 1, 11)]
    small = [(0x0201, 4, 1, "thumbnail"), (0x0202, 4, 1, len(thumbnail))]
    directories = {"main": main, "exif": exif, "interoperability": interoperability}
    if thumbnail:
        directories["small"] = small
    data = {
        "across": struct.pack(order + "LL", 300, 1),
        "down": struct.pack(order + "LL", 150, 1),
        "notes": b"opaque notes 01234567",
        "extra": extra,
        "thumbnail": thumbnail,
    }
    places, place = {}, 8
    for name, entries in directories.items():
        places[name], place = place, place + 6 + 12 * len(entries)
    for name, content in data.items():
        places[name], place = place, place + len(content)
    block = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "L", 8)
    for name, entries in directories.items():
        block += struct.pack(order + "H", len(entries))
        for tag, kind, count, value in entries:
            number = places[value] if isinstance(value, str) else value
            short = kind == 3 and not isinstance(value, str)
            block += struct.pack(order + "HHL", tag, kind, count) + struct.pack(order + ("HH" if short else "L"), *(
                (number, 0) if short else (number,)))  # fmt: skip
        block += struct.pack(order + "L", places["small"] if name == "main" and thumbnail else 0)
    return b"Exif\0\0" + block + b"".join(data.values())


def told(path):
    """What Pillow finds in a file of what a block says."""
    with PIL.Image.open(path) as image:
        exif = image.getexif()
        photo, small = exif.get_ifd(0x8769), exif.get_ifd(1)
        return dict(exif), photo, small, exif.get_ifd(0xA005)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(array, *chunks):
    height, width, channels = array.shape
    bits = 8 * array.itemsize
    header = struct.pack(">IIBBBBB", width, height, bits, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(f">u{array.itemsize}").tobytes() for row in array)
    body = b"".join(chunk(*each) for each in chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body


def chunks_of(path):
    content, place, found = path.read_bytes(), 8, {}
    while place < len(content):
        length, name = struct.unpack_from(">I4s", content, place)
        found[name], place = content[place + 8 : place + 8 + length], place + 12 + length
    return found


@pytest.fixture
def jpeg(tmp_path):
    """A photo on its side with all that a camera and a program write."""
    iptc = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(IPTC)) + IPTC + b"\0" * (len(IPTC) % 2)
    segment = b"\xff\xed" + struct.pack(">H", 2 + len(iptc)) + iptc
    options = {"exif": exif_block(), "icc_profile": ICC, "xmp": XMP, "comment": b"a comment", "dpi": (300, 150)}
    PIL.Image.fromarray(pixels()).save(tmp_path / "photo.jpg", extra=segment, quality=95, **options)
    return tmp_path / "photo.jpg"


@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize("suffix", [".jpg", *LOSSLESS])
@pytest.mark.filterwarnings("ignore:not kept in")
def test_sizes_orientation_and_thumbnail_are_those_of_the_result(tmp_path, jpeg, suffix, scale):
    image = read_image(jpeg)
    assert image.pixels.shape == (7, 11, 3)
    larger = image.pixels.repeat(scale, 0).repeat(scale, 1)
    write_image(tmp_path / f"out{suffix}", dataclasses.replace(image, pixels=larger))
    main, photo, small, interoperability = told(tmp_path / f"out{suffix}")
    height, width = larger.shape[:2]
    assert (photo[0xA002], photo[0xA003]) == (width, height) and main.get(0x0112, 1) == 1 and not small
    assert (main[0x0100], main[0x0101]) == (width, height)
    assert (main[0x011A], main[0x011B]) == (150, 300)  # turned with the picture
    assert photo[0x927C].startswith(b"opaque notes")
    if suffix != ".tif":  # whose tags are put together anew
        assert (interoperability[0x1001], interoperability[0x1002]) == (width, height)
    again = read_image(tmp_path / f"out{suffix}")
    np.testing.assert_array_equal(again.pixels.shape, larger.shape)
    assert b'tiff:Orientation="1"' in again.xmp and b'tiff:ImageWidth="%d"' % width in again.xmp
    assert b"<exif:PixelYDimension>%d<" % height in again.xmp and b"<dc:title>Orientation<" in again.xmp
    assert again.icc_profile == ICC


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("length", [8, 70_000])
def test_blocks_are_changed_in_place(tmp_path, order, length):
    """So that a camera's notes, which point into the block, stay right; short numbers grow where they must."""
    block = exif_block(order, orientation=1, thumbnail=b"", extra=b"e" * 9)
    image = Image(np.zeros((5, length, 1), np.uint8), exif=block)
    write_image(tmp_path / "out.png", image)
    found = chunks_of(tmp_path / "out.png")[b"eXIf"]
    plain = block.removeprefix(b"Exif\0\0")
    assert len(found) == len(plain) and found.endswith(plain[plain.index(b"opaque") - 16 :])
    main, photo, _, interoperability = told(tmp_path / "out.png")
    assert main[0x0100] == photo[0xA002] == interoperability[0x1001] == length


def test_a_thumbnail_is_taken_out_and_named(tmp_path, jpeg):
    image = read_image(jpeg)
    assert b"small" not in image.exif
    with pytest.warns(UserWarning, match="not kept in a JPEG file: EXIF thumbnail$"):
        write_image(tmp_path / "out.jpg", image)
    assert b"small" not in (tmp_path / "out.jpg").read_bytes()


def test_a_jpeg_keeps_all_and_others_name_what_they_drop(tmp_path, jpeg):
    image = read_image(jpeg)
    image = dataclasses.replace(image, blocks=tuple(each for each in image.blocks if each.format))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_image(tmp_path / "out.jpg", image)
    again = read_image(tmp_path / "out.jpg")
    for field in ("icc_profile", "exif", "xmp", "iptc", "resolution", "blocks"):
        assert getattr(again, field) == getattr(image, field), field
    assert again.iptc == IPTC and again.resolution == (150, 300) and again.blocks[0].data == b"a comment"
    for suffix, names in (
        (".png", "IPTC, comment"),
        (".webp", "IPTC, comment"),
        (".tif", "comment"),
        (".bmp", "ICC profile, EXIF, XMP, IPTC, comment"),
    ):
        with pytest.warns(UserWarning, match=f"not kept in a .* file: {names}$"):
            write_image(tmp_path / f"out{suffix}", image)
    with PIL.Image.open(tmp_path / "out.bmp") as bitmap:
        assert bitmap.info["dpi"] == pytest.approx((150, 300), abs=0.1)


def test_a_tiff_keeps_xmp_iptc_profile_and_resolution(tmp_path):
    image = Image(pixels(), None, ICC, None, XMP, IPTC, (300, 150))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_image(tmp_path / "a.tif", image)
        again = read_image(tmp_path / "a.tif")
        assert again.pixels.shape == (7, 11, 3)  # turned, as the XMP says
        write_image(tmp_path / "b.tif", again)
    last = read_image(tmp_path / "b.tif")
    assert (last.icc_profile, last.iptc, last.resolution) == (ICC, IPTC, (150, 300))
    assert b'tiff:Orientation="1"' in last.xmp


def test_tiff_tags_that_are_not_kept_are_named(tmp_path):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[269], tags[305] = "a document", "a program"
    PIL.Image.fromarray(pixels()).save(tmp_path / "a.tif", tiffinfo=tags)
    with pytest.warns(UserWarning, match="not kept in a .* file: DocumentName$"):
        write_image(tmp_path / "out.tif", read_image(tmp_path / "a.tif"))
    assert told(tmp_path / "out.tif")[0][305] == "a program"


@pytest.mark.parametrize("numbers", [(0, 0), (1, 0), (0, 1), (2**32 - 1, 1)])
def test_a_resolution_that_is_none_is_left_out(tmp_path, numbers):
    value = TiffImagePlugin.IFDRational(*numbers)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[282], tags[283] = value, value
    PIL.Image.fromarray(pixels()).save(tmp_path / "a.tif", tiffinfo=tags)
    metres = struct.pack(">IIB", 0, 2**31 - 1, 1)
    (tmp_path / "a.png").write_bytes(png(pixels(), (b"pHYs", metres)))
    for name in ("a.tif", "a.png"):
        image = read_image(tmp_path / name)
        assert image.resolution is None
        for suffix in (".png", ".tif", ".jpg"):
            write_image(tmp_path / f"out{suffix}", image)


COLOUR = {
    b"gAMA": struct.pack(">I", 100000),
    b"cHRM": struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000),
    b"cICP": bytes([9, 16, 0, 1]),
    b"sRGB": b"\0",
    b"tEXt": b"parameters\0a prompt",
    b"pHYs": struct.pack(">IIB", 11811, 5906, 1),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_chunks_are_kept(tmp_path, channels, dtype):
    if dtype == np.uint16:
        pytest.importorskip("imagecodecs")
    (tmp_path / "a.png").write_bytes(png(pixels(dtype, channels), *COLOUR.items()))
    image = read_image(tmp_path / "a.png")
    assert image.resolution == pytest.approx((300, 150), abs=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_image(tmp_path / "out.png", image)
    found = chunks_of(tmp_path / "out.png")
    assert {name: found.get(name) for name in COLOUR} == COLOUR
    np.testing.assert_array_equal(read_image(tmp_path / "out.png").pixels, image.pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".webp", ".bmp"])
def test_png_chunks_that_others_do_not_hold_are_named(tmp_path, suffix):
    (tmp_path / "a.png").write_bytes(png(pixels(), *list(COLOUR.items())[:5], (b"bKGD", bytes(6))))
    names = "gAMA, cHRM, cICP, sRGB, tEXt, bKGD"
    with pytest.warns(UserWarning, match=f"not kept in a .* file: {names}$"):
        write_image(tmp_path / f"out{suffix}", read_image(tmp_path / "a.png"))


def test_unknown_chunks_are_copied_where_png_says_that_they_may_be(tmp_path):
    (tmp_path / "a.png").write_bytes(png(pixels(), (b"prVt", b"may be copied"), (b"prVT", b"depends on the pixels")))
    with pytest.warns(UserWarning, match="not kept in a PNG file: prVT$"):
        write_image(tmp_path / "out.png", read_image(tmp_path / "a.png"))
    assert b"prVt" in chunks_of(tmp_path / "out.png") and b"prVT" not in chunks_of(tmp_path / "out.png")


def test_exif_in_the_text_of_a_png_is_applied_and_kept_once(tmp_path):
    block = exif_block(thumbnail=b"")
    text = b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n%8d\n" % len(block) + block.hex().encode())
    (tmp_path / "a.png").write_bytes(png(pixels(), (b"zTXt", text)))
    image = read_image(tmp_path / "a.png")
    assert image.pixels.shape == (7, 11, 3)
    write_image(tmp_path / "out.png", image)
    assert b"zTXt" not in chunks_of(tmp_path / "out.png") and told(tmp_path / "out.png")[1][0xA002] == 11
    assert read_image(tmp_path / "out.png").pixels.shape == (7, 11, 3)


def test_exif_over_64_kilobytes_does_not_fail_a_jpeg(tmp_path):
    image = Image(pixels(), exif=exif_block(orientation=1, thumbnail=b"", extra=bytes(70_000)))
    write_image(tmp_path / "a.png", image)
    again = read_image(tmp_path / "a.png")
    assert len(again.exif) > 70_000
    with pytest.warns(UserWarning, match="not kept in a JPEG file: EXIF over 64 KB$"):
        write_image(tmp_path / "out.jpg", again)
    assert read_image(tmp_path / "out.jpg").exif is None
    with pytest.warns(UserWarning, match="XMP over 64 KB, IPTC over 64 KB$"):
        write_image(tmp_path / "out.jpg", Image(pixels(), xmp=bytes(65_530), iptc=bytes(65_530)))
    largest = Image(pixels(), xmp=XMP + b" " * (65_504 - len(XMP)), iptc=b"\x1c" * 65_469,
                    exif=exif_block(orientation=1, thumbnail=b"", extra=bytes(70_000))[:65_533])  # fmt: skip
    write_image(tmp_path / "out.jpg", largest)
    again = read_image(tmp_path / "out.jpg")
    assert len(again.xmp) == len(largest.xmp) and again.exif[:99] != b"" and again.iptc == largest.iptc


def test_the_second_picture_of_a_phone_is_named(tmp_path):
    first, second = (PIL.Image.fromarray(pixels() // divisor) for divisor in (1, 2))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second], quality=95)
    with pytest.warns(UserWarning, match="not kept in a .* file: further pictures"):
        write_image(tmp_path / "out.jpg", read_image(tmp_path / "a.jpg"))


def test_the_profile_in_a_bitmap_is_found(tmp_path):
    PIL.Image.fromarray(pixels()).save(tmp_path / "a.bmp")
    content = (tmp_path / "a.bmp").read_bytes()
    header = bytearray(content[14:54]) + bytearray(84)
    struct.pack_into("<I", header, 0, 124)
    struct.pack_into("<I", header, 56, 0x4D424544)
    data = content[54:]
    struct.pack_into("<II", header, 112, 124 + len(data), len(ICC))
    start = content[:10] + struct.pack("<I", 138)
    (tmp_path / "a.bmp").write_bytes(start + bytes(header) + data + ICC)
    image = read_image(tmp_path / "a.bmp")
    np.testing.assert_array_equal(image.pixels, pixels())
    assert image.icc_profile == ICC


def test_damaged_exif_never_stops_a_photo(tmp_path):
    block = exif_block()
    random = np.random.default_rng(0)
    for number in range(400):
        hurt = bytearray(block)
        if number % 2:
            del hurt[random.integers(6, len(hurt)) :]
        else:
            hurt[random.integers(6, 120)] = random.integers(256)
        image = io.BytesIO()
        PIL.Image.fromarray(pixels()).save(image, "JPEG", exif=bytes(hurt))
        (tmp_path / "a.jpg").write_bytes(image.getvalue())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                PIL.Image.open(tmp_path / "a.jpg").close()
            except PIL.UnidentifiedImageError:  # it is too much for Pillow
                continue
            read = read_image(tmp_path / "a.jpg")
            write_image(tmp_path / "out.jpg", read)
            write_image(tmp_path / "out.tif", read)
        assert read.exif is not None or any(each.name == "damaged EXIF" for each in read.blocks)
        assert read_image(tmp_path / "out.jpg").pixels.shape == read.pixels.shape


# --- Pillow's images


class Enlarge(nn.Upsample):
    contract = Contract(scale=lambda task: 2)


@pytest.mark.filterwarnings("ignore:not kept in")
def test_pillow_images_keep_what_is_true(tmp_path, jpeg):
    with PIL.Image.open(jpeg) as image:
        result = restore(image, Enlarge(scale_factor=2))
    assert result.size == (14, 22) and result.info["icc_profile"] == ICC
    result.save(tmp_path / "out.jpg", exif=result.info["exif"], xmp=result.info["xmp"])
    main, photo, small, _ = told(tmp_path / "out.jpg")
    assert (photo[0xA002], photo[0xA003]) == (14, 22) and main[0x0112] == 6 and not small  # it was not turned
    assert b'tiff:ImageWidth="14"' in result.info["xmp"]
    with PIL.Image.open(jpeg) as image, pytest.warns(UserWarning, match="not kept in the result: EXIF thumbnail"):
        restore(image, nn.Identity())


def test_how_a_pillow_image_was_stored_is_not_carried_to_the_result(tmp_path):
    bits = PIL.Image.fromarray(pixels()[:, :, 0] > 100)
    bits.save(tmp_path / "fax.tif", compression="group4")
    with PIL.Image.open(tmp_path / "fax.tif") as image:
        result = restore(image, nn.Identity())
    result.save(tmp_path / "out.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "out.tif").pixels[:, :, 0], np.asarray(bits) * 255)
    assert torch.is_tensor(restore(torch.zeros(1, 1, 4, 4), nn.Identity()))
