"""TIFF files of every layout: pixel by pixel as tifffile reads them, or refused with the true reason."""

import itertools
import sys
import warnings
from typing import NamedTuple

import numpy as np
import PIL.Image
import pytest

from ipt_fast.data.io import Image, read_header, read_image, write_image

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

HEIGHT, WIDTH = 37, 45
LAYOUTS = {"one strip": {}, "strips": {"rowsperstrip": 5}, "tiles": {"tile": (16, 32)}}
COMPRESSIONS = (None, "lzw", "zlib", "adobe_deflate", "zstd", "packbits", "lzma")


class Kind(NamedTuple):
    """Colours and further channels of a file, and why it is not read."""

    photometric: str
    channels: int
    extra: tuple[str, ...] = ()
    reason: str | None = None


KINDS = (
    Kind("minisblack", 1),
    Kind("miniswhite", 1),
    Kind("palette", 1),
    Kind("rgb", 3),
    Kind("minisblack", 2, ("unassalpha",)),
    Kind("minisblack", 2, ("assocalpha",)),
    Kind("minisblack", 2, ("unspecified",)),
    Kind("miniswhite", 2, ("unassalpha",)),
    Kind("miniswhite", 2, ("assocalpha",), "associated alpha must come with colours in which black is zero"),
    Kind("rgb", 4, ("unassalpha",)),
    Kind("rgb", 4, ("assocalpha",)),
    Kind("rgb", 4, ("unspecified",)),
    Kind("minisblack", 3, ("unspecified", "unspecified"), "gray must have 1 channels and at most one more; got 3"),
    Kind("minisblack", 4, ("unassalpha", "unspecified", "unspecified"), "gray must have 1 channels .*; got 4"),
    Kind("rgb", 5, ("unassalpha", "unspecified"), "RGB must have 3 channels and at most one more; got 5"),
    Kind("rgb", 5, ("unspecified", "assocalpha"), "RGB must have 3 channels and at most one more; got 5"),
    Kind("separated", 4, (), "its colours must be gray, RGB or a palette; got CMYK"),
    Kind("separated", 5, ("unassalpha",), "got CMYK"),
    Kind("cielab", 3, (), "got Lab"),
    Kind("ycbcr", 3, (), "got YCbCr"),
    Kind("cfa", 1, (), "got a raw photo"),
)


def samples(kind, dtype, seed=0):
    """(H, W, channels), with colours that associated alpha allows."""
    top = np.iinfo(dtype).max
    values = np.random.default_rng(seed).integers(0, top, (HEIGHT, WIDTH, kind.channels), dtype, endpoint=True)
    if kind.extra:
        first = kind.channels - len(kind.extra)
        values[:20, :9, first] = 0
        values[20:, :9, first] = top
        if "assocalpha" in kind.extra:
            alpha = values[:, :, first + kind.extra.index("assocalpha")].astype(np.uint64)
            values[:, :, :first] = (values[:, :, :first] * alpha[:, :, None] + top // 2) // top
    return values


def write(path, kind, dtype, *, planar="contig", pages=1, **options):
    """A file by tifffile."""
    palette = np.random.default_rng(5).integers(0, 256, (3, 2 ** (8 * np.dtype(dtype).itemsize)), np.uint16) * 257
    with tifffile.TiffWriter(path, byteorder=options.pop("byteorder", "<"), bigtiff=options.pop("big", False)) as file:
        for page in range(pages):
            values = samples(kind, dtype, page)
            if kind.channels == 1:
                values = values[:, :, 0]
            elif planar == "separate":
                values = np.moveaxis(values, 2, 0)
            file.write(
                values,
                photometric=kind.photometric,
                planarconfig=None if kind.channels == 1 else planar,
                extrasamples=kind.extra or None,
                colormap=palette if kind.photometric == "palette" else None,
                metadata=None,
                subsampling=(1, 1) if kind.photometric == "ycbcr" else None,
                **options,
            )


def expected(path, kind):
    """(colours, further channel or None) as tifffile reads them, by the meaning of the colours."""
    with tifffile.TiffFile(path) as file:
        values, palette = file.pages[0].asarray(), file.pages[0].colormap
        if file.pages[0].axes == "SYX":
            values = np.moveaxis(values, 0, 2)
    values = np.atleast_3d(values)
    first = kind.channels - len(kind.extra)
    colours, extra = values[:, :, :first], values[:, :, first] if kind.extra else None
    if kind.photometric == "palette":
        return (palette[:, colours[:, :, 0]] // 257).transpose(1, 2, 0).astype(np.uint8), None
    return (np.iinfo(values.dtype).max - colours if kind.photometric == "miniswhite" else colours), extra


def premultiplied(image):
    top = np.iinfo(image.pixels.dtype).max
    return np.rint(image.pixels * (image.alpha[:, :, None] / top)).astype(image.pixels.dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_every_layout_is_read_as_tifffile_reads_it_or_refused(tmp_path, compression, layout, dtype):
    path, out, read = tmp_path / "a.tif", tmp_path / "out.tif", 0
    for kind, planar, byteorder in itertools.product(KINDS, ("contig", "separate"), "<>"):
        if (kind.channels == 1 and planar == "separate") or (kind.photometric == "palette" and dtype == np.uint16):
            continue
        write(path, kind, dtype, planar=planar, byteorder=byteorder, compression=compression, **LAYOUTS[layout])
        if kind.reason:
            for function in (read_image, read_header):
                with pytest.raises(ValueError, match=rf"cannot read image .*a\.tif: .*{kind.reason}"):
                    function(path)
            continue
        image, (colours, extra), case = read_image(path), expected(path, kind), (kind, planar, byteorder)
        assert read_header(path) == (HEIGHT, WIDTH, image.pixels.dtype), case
        stored = premultiplied(image) if kind.extra == ("assocalpha",) else image.pixels
        np.testing.assert_array_equal(stored, colours, str(case))
        np.testing.assert_array_equal(image.alpha, extra, str(case))
        write_image(out, image)
        again = tifffile.imread(out)
        both = colours if extra is None else np.dstack([colours, extra])
        np.testing.assert_array_equal(np.atleast_3d(again), both, str(case))
        with tifffile.TiffFile(out) as file:  # the further channel is called what it was called
            assert [each.name.lower() for each in file.pages[0].extrasamples] == list(kind.extra), case
        read += 1
    assert read >= 20


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compression", [None, *COMPRESSIONS[1:6]])
def test_without_the_extra_eight_bits_are_right_or_refused_by_its_name(tmp_path, monkeypatch, compression, layout):
    path, read = tmp_path / "a.tif", 0
    for kind, planar, byteorder in itertools.product(KINDS, ("contig", "separate"), "<>"):
        if kind.channels == 1 and planar == "separate":
            continue
        write(path, kind, np.uint8, planar=planar, byteorder=byteorder, compression=compression, **LAYOUTS[layout])
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "tifffile", None)
            try:
                image = read_image(path)
            except ImportError as error:
                assert "pip install ipt-fast[io]" in str(error)
                continue
        colours, extra = expected(path, kind)
        np.testing.assert_array_equal(image.pixels, colours, str((kind, planar, byteorder)))
        np.testing.assert_array_equal(image.alpha, extra, str((kind, planar, byteorder)))
        assert not kind.reason
        read += 1
    assert read >= 4 or compression == "zstd"


def test_without_the_extra_sixteen_bits_name_it(tmp_path, monkeypatch):
    write_image(tmp_path / "a.tif", Image(samples(KINDS[3], np.uint16)))
    monkeypatch.setitem(sys.modules, "imagecodecs", None)
    with pytest.raises(ImportError, match=r"a\.tif: TIFF of 16 bits.* pip install ipt-fast\[io\]"):
        read_image(tmp_path / "a.tif")


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("predictor", [False, True])
def test_predictors_and_files_of_64_bits(tmp_path, predictor, big):
    for kind, dtype, byteorder in itertools.product(KINDS[3:5], (np.uint8, np.uint16), "<>"):
        write(tmp_path / "a.tif", kind, dtype, big=big, byteorder=byteorder, compression="lzw", predictor=predictor)
        image = read_image(tmp_path / "a.tif")
        channels = image.pixels if image.alpha is None else np.dstack([image.pixels, image.alpha])
        np.testing.assert_array_equal(channels, samples(kind, dtype))


@pytest.mark.parametrize("compression", ["jpeg", "jpeg2000", "webp", "jpegxl"])
def test_compressions_of_photos(tmp_path, compression):
    colour = Kind("ycbcr" if compression == "jpeg" else "rgb", 3)
    for layout, options in LAYOUTS.items():
        write(tmp_path / "a.tif", colour, np.uint8, compression=compression, **options)
        with tifffile.TiffFile(tmp_path / "a.tif") as file:
            expected = file.pages[0].asarray()
        np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, expected, layout)


@pytest.mark.parametrize("bits", [1, 2, 4, 6, 10, 12, 14])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_other_depths_become_8_or_16_bits(tmp_path, photometric, bits):
    white = 2**bits - 1
    dtype = np.uint8 if bits <= 8 else np.uint16
    values = np.random.default_rng(0).integers(0, white, (HEIGHT, WIDTH), dtype, endpoint=True)
    if bits == 1:
        tifffile.imwrite(tmp_path / "a.tif", values.astype(bool), photometric=photometric)
    else:
        tifffile.imwrite(tmp_path / "a.tif", values, photometric=photometric, bitspersample=bits)
    image = read_image(tmp_path / "a.tif")
    shown = white - values.astype(float) if photometric == "miniswhite" else values
    assert image.pixels.dtype == dtype and read_header(tmp_path / "a.tif")[2] == dtype
    np.testing.assert_array_equal(image.pixels[:, :, 0], np.rint(shown * (np.iinfo(dtype).max / white)))


def test_fax_pages(tmp_path):
    bits = PIL.Image.fromarray(samples(KINDS[0], np.uint8)[:, :, 0] > 100)
    for compression in ("group3", "group4", "tiff_ccitt", "packbits"):
        bits.save(tmp_path / "a.tif", compression=compression)
        image = read_image(tmp_path / "a.tif")
        np.testing.assert_array_equal(image.pixels[:, :, 0], np.asarray(bits) * 255)
        write_image(tmp_path / "out.tif", image)
        with tifffile.TiffFile(tmp_path / "out.tif") as file:
            assert not {292, 293} & {tag.code for tag in file.pages[0].tags}


@pytest.mark.parametrize("dtype, reason", [(np.float32, "floating point"), (np.int16, "signed integers"),
                                           (np.uint32, "32 bits"), (np.float16, "floating point"),
                                           (np.complex64, "complex numbers")])  # fmt: skip
def test_other_numbers_are_refused(tmp_path, dtype, reason):
    tifffile.imwrite(tmp_path / "a.tif", np.ones((9, 9), dtype), photometric="minisblack")
    with pytest.raises(ValueError, match=rf"must be unsigned integers, .* of 1 to 16 bits; got {reason}"):
        read_image(tmp_path / "a.tif")


def test_palette_of_sixteen_bits_is_not_reduced(tmp_path):
    indices = np.arange(48, dtype=np.uint8).reshape(6, 8)
    palette = np.random.default_rng(0).integers(0, 65536, (3, 256), np.uint16)
    tifffile.imwrite(tmp_path / "a.tif", indices, photometric="palette", colormap=palette)
    assert read_header(tmp_path / "a.tif")[2] == np.uint16
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif").pixels, palette[:, indices].transpose(1, 2, 0))


def test_more_pages_are_refused_and_smaller_copies_named(tmp_path):
    path = tmp_path / "a.tif"
    write(path, KINDS[3], np.uint8, pages=3)
    with pytest.raises(ValueError, match=r"a\.tif: it must have one frame or page; got 3"):
        read_image(path)
    stack = np.zeros((4, HEIGHT, WIDTH), np.uint8)
    tifffile.imwrite(path, stack, imagej=True)  # ImageJ keeps all in one page
    with pytest.raises(ValueError, match="it must have one frame or page; got 4"):
        read_image(path)
    values = samples(KINDS[3], np.uint8)
    with tifffile.TiffWriter(path) as file:
        file.write(values, photometric="rgb", subifds=1)
        file.write(values[::2, ::2], photometric="rgb", subfiletype=1)
    image = read_image(path)
    np.testing.assert_array_equal(image.pixels, values)
    with pytest.warns(UserWarning, match="not kept in a .* file: .*smaller pictures"):
        write_image(tmp_path / "out.tif", image)


@pytest.mark.parametrize("compression", [None, "lzw", "zlib", "zstd", "packbits"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_truncated_file_never_gives_a_picture(tmp_path, layout, compression):
    path = tmp_path / "a.tif"
    write(path, KINDS[3], np.uint8, compression=compression, **LAYOUTS[layout])
    content = path.read_bytes()
    for length in range(10, len(content), len(content) // 9):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cannot read image .*a\.tif"):
            read_image(path)


def test_missing_strips_are_not_made_up(tmp_path):
    path = tmp_path / "a.tif"
    write(path, KINDS[3], np.uint8, compression="zlib", rowsperstrip=5)
    for tag in (273, 279):  # places and sizes of the strips
        write(path, KINDS[3], np.uint8, compression="zlib", rowsperstrip=5)
        with tifffile.TiffFile(path, mode="r+") as file:
            field = file.pages[0].tags[tag]
            field.overwrite([0, *field.value[1:]])
        with pytest.raises(ValueError, match="all its strips or tiles; got a damaged or truncated file"):
            read_image(path)


def test_colours_brighter_than_associated_alpha_are_named(tmp_path):
    values = np.full((4, 4, 4), 200, np.uint8)
    values[:, :, 3] = 100
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="rgb", extrasamples=("assocalpha",))
    image = read_image(tmp_path / "a.tif")
    assert (image.pixels == 255).all()
    with pytest.warns(UserWarning, match="colours brighter than their associated alpha"):
        write_image(tmp_path / "out.tif", image)


def test_an_unspecified_channel_stays_in_a_tiff(tmp_path):
    write(tmp_path / "a.tif", Kind("rgb", 4, ("unspecified",)), np.uint8)
    with pytest.raises(ValueError, match=r"must end in \.tif, \.tiff for .* a channel of unspecified meaning"):
        write_image(tmp_path / "out.png", read_image(tmp_path / "a.tif"))


def test_damaged_files_are_one_sentence(tmp_path):
    """Any byte of header and directory may be wrong: a picture comes out, or a ValueError that names the file."""
    random, path, refused = np.random.default_rng(0), tmp_path / "a.tif", 0
    for kind, layout in itertools.product((KINDS[2], KINDS[3]), LAYOUTS.values()):
        write(path, kind, np.uint8, compression="lzw", **layout)
        content = path.read_bytes()
        for _ in range(60):
            hurt = bytearray(content)
            hurt[random.integers(0, 300)] = random.integers(256)
            path.write_bytes(hurt)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    assert read_image(path).pixels.ndim == 3
                except ValueError as error:
                    assert "a.tif" in str(error)
                    refused += 1
    assert refused > 100
