"""Tags of TIFF and EXIF keep their bytes, whatever a program wrote into them, or are named."""

import io
import struct
import warnings

import numpy as np
import PIL.Image
import pytest
from torch import nn

from ipt_fast.cli import main
from ipt_fast.data.io import read_image, write_image
from ipt_fast.inference import restore

tifffile = pytest.importorskip("tifffile")
pytest.importorskip("imagecodecs")

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 11, 3), np.uint8)
ASCII, SHORT, RATIONAL = 2, 3, 5
TEXT = {33432: "© Jörg".encode(), 315: "Jörg".encode("latin-1"), 270: "Zürich".encode()}
IPTC = b"\x1c\x02\x78\x00\x0bhello iptc!"


def directory(entries, place, order):
    """(tag, type, count, bytes) of each entry, packed."""
    out, behind = struct.pack(order + "H", len(entries)), b""
    end = place + 2 + 12 * len(entries) + 4
    for tag, kind, count, data in sorted(entries):
        out += struct.pack(order + "HHL", tag, kind, count)
        inside = len(data) <= 4
        out += data.ljust(4, b"\0") if inside else struct.pack(order + "L", end + len(behind))
        behind += b"" if inside else data + bytes(len(data) % 2)
    return out + bytes(4) + behind


def tagged(main=(), photo=(), gps=(), order="<"):
    """A TIFF header with directories; they may say anything."""
    pointers = [(0x8769, photo), (0x8825, gps)]
    main = [*main, *((tag, 4, 1, bytes(4)) for tag, entries in pointers if entries)]
    place, below = 8 + len(directory(main, 8, order)), b""
    for tag, entries in pointers:
        if entries:
            main[[each[0] for each in main].index(tag)] = (tag, 4, 1, struct.pack(order + "L", place + len(below)))
            below += directory(entries, place + len(below), order)
    head = b"II*\0" if order == "<" else b"MM\0*"
    return head + struct.pack(order + "L", 8) + directory(main, 8, order) + below


def jpeg(path, **entries):
    PIL.Image.fromarray(PIXELS).save(path, exif=b"Exif\0\0" + tagged(**entries), quality=95)
    return path


def tiff(path, main=(), photo=(), gps=(), order="<"):
    """A TIFF of 8-bit gray with these tags."""
    number = lambda kind, value: struct.pack(order + {3: "H", 4: "L"}[kind], value)  # noqa: E731
    layout = [(256, 4, 1, number(4, 11)), (257, 4, 1, number(4, 7)), (258, 3, 1, number(3, 8)),
              (262, 3, 1, number(3, 1)), (279, 4, 1, number(4, 77)), (277, 3, 1, number(3, 1))]  # fmt: skip
    given = {each[0] for each in main}
    entries = [*main, *(each for each in layout if each[0] not in given)]
    size = len(tagged([*entries, (273, 4, 1, bytes(4))], photo, gps, order))
    whole = tagged([*entries, (273, 4, 1, number(4, size))], photo, gps, order)
    path.write_bytes(whole + PIXELS[:, :, 0].tobytes())
    return path


def rational(order, *numbers):
    return struct.pack(f"{order}{len(numbers)}L", *numbers)


def tags_of(path, below=None):
    """{tag: (type, bytes)} of the first directory of a TIFF file, or of one that a tag of it points to."""
    content, found = path.read_bytes(), {}
    start = struct.unpack_from("<L", content, 4)[0]
    if below is not None:
        start = struct.unpack("<L", tags_of(path)[below][1])[0]
    for place in range(start + 2, start + 2 + 12 * struct.unpack_from("<H", content, start)[0], 12):
        tag, kind, count = struct.unpack_from("<HHL", content, place)
        size = count * {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 9: 4, 10: 8, 11: 4}[kind]
        where = place + 8 if size <= 4 else struct.unpack_from("<L", content, place + 8)[0]
        found[tag] = kind, content[where : where + size]
    return found


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("make, name", [(jpeg, "a.jpg"), (tiff, "a.tif")])
def test_values_of_other_types_are_kept_as_they_are(tmp_path, make, name, order):
    gps = [(0, ASCII, 4, b"2300"), (5, ASCII, 2, b"0\0"), (2, RATIONAL, 3, rational(order, 1, 1, 2, 1, 3, 0))]
    photo = [(0x9204, RATIONAL, 1, rational(order, 2**32 - 1, 3)), (0xFE00, 6, 3, b"\xff\xfe\xfd"),
             (0x9286, ASCII, 6, b"hello\0"), (0x9101, ASCII, 4, b"abc\0")]  # fmt: skip
    path = make(tmp_path / name, photo=photo, gps=gps, order=order)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_image(tmp_path / "out.tif", read_image(path))
        write_image(tmp_path / "again.tif", read_image(tmp_path / "out.tif"))
    for out in ("out.tif", "again.tif"):
        found = tags_of(tmp_path / out, 0x8825) | tags_of(tmp_path / out, 0x8769)
        assert found == {
            0: (ASCII, b"2300"), 5: (ASCII, b"0\0"), 2: (RATIONAL, rational("<", 1, 1, 2, 1, 3, 0)),
            0x9204: (RATIONAL, rational("<", 2**32 - 1, 3)), 0xFE00: (6, b"\xff\xfe\xfd"),
            0x9286: (ASCII, b"hello\0"), 0x9101: (ASCII, b"abc\0"),
        }  # fmt: skip


@pytest.mark.parametrize("make, name", [(jpeg, "a.jpg"), (tiff, "a.tif")])
@pytest.mark.parametrize("tag, entry, called", [
    (305, (RATIONAL, 2, rational("<", 1, 1, 2, 1)), "Software"), (270, (SHORT, 1, b"\5\0"), "ImageDescription"),
    (282, (ASCII, 3, b"72\0"), "XResolution"), (296, (ASCII, 2, b"2\0"), "ResolutionUnit"),
])  # fmt: skip
def test_what_cannot_be_what_its_tag_says_is_named(tmp_path, make, name, tag, entry, called):
    path = make(tmp_path / name, main=[(tag, *entry), (271, ASCII, 5, b"Make\0")])
    with pytest.warns(UserWarning, match=f"not kept in a TIFF file: {called}$"):
        write_image(tmp_path / "out.tif", read_image(path))
    found = tags_of(tmp_path / "out.tif")
    assert tag not in found and found[271] == (ASCII, b"Make\0")


def test_odd_tags_do_not_end_a_run(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        odd = [(305, RATIONAL, 2, rational("<", 1, 1, 2, 1))] if number == 1 else []
        tiff(tmp_path / "in" / f"{number}.tif", main=odd, gps=[(5, ASCII, 2, b"0\0")])
    assert main(["restore", str(tmp_path / "in"), str(tmp_path / "out")]) == 0
    assert len(list((tmp_path / "out").glob("*.tif"))) == 3


def test_what_a_codec_raises_is_an_error_of_this_image(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise AttributeError("a codec's own")

    monkeypatch.setattr(PIL.Image.Image, "save", fail)
    image = read_image(tiff(tmp_path / "a.tif"))
    with pytest.raises(ValueError, match=r"cannot write image .*out\.webp: a codec's own"):
        write_image(tmp_path / "out.webp", image)
    monkeypatch.setattr(PIL.Image, "open", fail)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"cannot read image .*a\.png: a codec's own"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("make, name", [(jpeg, "a.jpg"), (tiff, "a.tif")])
def test_text_keeps_its_bytes(tmp_path, make, name):
    path = make(tmp_path / name, main=[(tag, ASCII, len(text) + 1, text + b"\0") for tag, text in TEXT.items()])
    write_image(tmp_path / "b.tif", read_image(path))
    for suffix in (".tif", ".jpg", ".png", ".webp"):
        write_image(tmp_path / f"out{suffix}", read_image(tmp_path / "b.tif"))
        content = (tmp_path / f"out{suffix}").read_bytes()
        assert all(text in content for text in TEXT.values()), suffix
    found = tags_of(tmp_path / "out.tif")
    assert {tag: found[tag] for tag in TEXT} == {tag: (ASCII, text + b"\0") for tag, text in TEXT.items()}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind, size", [(1, 1), (4, 4), (6, 1), (7, 1), (11, 4), (ASCII, 1)])
def test_bytes_that_are_called_numbers_stay_bytes(tmp_path, kind, size, order):
    for tag, field, data in ((33723, "iptc", IPTC), (34675, "icc_profile", b"pro\xff"), (700, "xmp", b"<x:xmpmeta/>")):
        path = tiff(tmp_path / "a.tif", main=[(tag, kind, len(data) // size, data)], order=order)
        image = read_image(path)
        assert getattr(image, field) == data, (tag, kind)
        write_image(tmp_path / "out.tif", image)
        assert getattr(read_image(tmp_path / "out.tif"), field) == data


def test_iptc_in_the_order_of_a_files_numbers(tmp_path):
    turned = np.frombuffer(IPTC, ">u4").astype("<u4").tobytes()
    assert read_image(tiff(tmp_path / "a.tif", main=[(33723, 4, 4, turned)])).iptc == IPTC


KEPT = {0x9C9B: (1, 10, "Title".encode("utf-16-le")), 0x4746: (SHORT, 1, b"\5\0"),
        318: (RATIONAL, 2, rational("<", 3, 10, 3, 10)), 319: (RATIONAL, 6, rational("<", *[1, 3] * 6)),
        0x829A: (RATIONAL, 1, rational("<", 1, 250))}  # fmt: skip
NAMED = {532: (RATIONAL, 6, rational("<", *[0, 1, 255, 1] * 3)), 59932: (7, 2, b"ab"), 42112: (ASCII, 2, b"x\0"),
         301: (SHORT, 1, b"\1\0")}  # fmt: skip


@pytest.mark.parametrize("make, name", [(jpeg, "a.jpg"), (tiff, "a.tif")])
def test_main_tags_are_kept_or_named(tmp_path, make, name):
    path = make(tmp_path / name, main=[(tag, *entry) for tag, entry in {**KEPT, **NAMED}.items()])
    names = "TransferFunction, ReferenceBlackWhite, (tag 42112|GDAL.*), tag 59932"
    with pytest.warns(UserWarning, match=f"not kept in a TIFF file: {names}$"):
        write_image(tmp_path / "out.tif", read_image(path))
    found = tags_of(tmp_path / "out.tif")
    assert {tag: found[tag] for tag in KEPT} == {tag: (kind, data) for tag, (kind, _, data) in KEPT.items()}
    assert not NAMED.keys() & found.keys()


def test_how_a_compressed_photo_is_stored_is_not_named(tmp_path):
    PIL.Image.fromarray(PIXELS).save(tmp_path / "a.tif", compression="jpeg")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_image(tmp_path / "out.tif", read_image(tmp_path / "a.tif"))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [1, 3, 4, 5])
@pytest.mark.parametrize("make, name", [(jpeg, "a.jpg"), (tiff, "a.tif")])
def test_orientation_of_any_whole_number(tmp_path, make, name, kind, order):
    if make is jpeg and kind == RATIONAL:  # which no program reads there
        return
    data = rational(order, 6, 1) if kind == RATIONAL else struct.pack(order + {1: "B", 3: "H", 4: "L"}[kind], 6)
    path = make(tmp_path / name, main=[(274, kind, 1, data)], order=order)
    assert read_image(path).pixels.shape[:2] == (11, 7)


@pytest.mark.parametrize("tag, called", [(34665, "ExifOffset"), (34853, "GPSInfo"), (270, "ImageDescription")])
def test_tags_that_point_out_of_the_file_are_named(tmp_path, tag, called):
    kind = (ASCII, 99) if tag == 270 else (4, 1)
    path = tiff(tmp_path / "a.tif", main=[(tag, *kind, struct.pack("<L", 10**8))])
    with pytest.warns(UserWarning, match=f"not kept in a TIFF file: {called}$"):
        write_image(tmp_path / "out.tif", read_image(path))


def test_large_files_have_offsets_of_64_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("ipt_fast.data._tiff_tags._CLASSIC_BYTES", 10)
    image = read_image(jpeg(tmp_path / "a.jpg", main=[(271, ASCII, 5, b"Make\0")], gps=[(5, ASCII, 2, b"0\0")]))
    write_image(tmp_path / "out.tif", image)
    with tifffile.TiffFile(tmp_path / "out.tif") as file:
        assert file.is_bigtiff and file.pages[0].tags[271].value == "Make"
        np.testing.assert_array_equal(file.pages[0].asarray(), image.pixels)
    assert read_image(tmp_path / "out.tif").exif == image.exif


def test_pillow_images_of_tiff_files(tmp_path):
    """Pillow cannot write all that it read."""
    tiff(tmp_path / "a.tif", gps=[(5, ASCII, 2, b"0\0")],
         main=[(270, ASCII, 8, "Zürich".encode() + b"\0"), (305, RATIONAL, 2, rational("<", 1, 1, 2, 1))])  # fmt: skip
    with (
        PIL.Image.open(tmp_path / "a.tif") as image,
        pytest.warns(UserWarning, match="not kept in the result: ") as told,
    ):
        result = restore(image, nn.Identity())
    messages = " ".join(str(each.message) for each in told)
    assert "Software" in messages and "GPSAltitudeRef" in messages and "Zürich".encode() in result.info["exif"]


@pytest.mark.parametrize("name, value", [("dpi", 72), ("dpi", (None, None)), ("exif", "text"), ("xmp", 5),
                                         ("icc_profile", "text"), ("photoshop", b"raw")])  # fmt: skip
def test_odd_entries_of_pillows_info_are_dropped_before_the_work(name, value):
    done = []

    class Work(nn.Identity):
        def forward(self, x):
            done.append("work")
            return x

    image = PIL.Image.fromarray(PIXELS)
    image.info = {name: value, "title": "kept"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.showwarning = lambda *args, **options: done.append(str(args[0]))
        result = restore(image, Work())
    assert not caught and done[0] == f"not kept in the result: info['{name}']" and "work" in done
    assert result.info == {"title": "kept"}
    result.save(io.BytesIO(), "JPEG")


def test_a_resolution_in_whole_numbers(tmp_path):
    short = struct.pack("<H", 72)
    image = read_image(tiff(tmp_path / "a.tif", main=[(282, SHORT, 1, short), (283, SHORT, 1, short)]))
    assert image.resolution == (72, 72)
