"""Which files count as images, what is said about the others, and which target belongs to which input."""

import base64
import io
import os
import tarfile
import warnings

import numpy as np
import PIL.Image
import pytest

from ipt_fast.data import dataset, files, formats, stream
from ipt_fast.data.files import find_images, list_images, list_shard, match_images, partner_of
from ipt_fast.data.io import read_header, read_image
from ipt_fast.evaluation import runner

LEFT_OUT = "as no image by name"


def save(path, size=(7, 9), **options):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(path, **options)
    return pixels


@pytest.mark.parametrize(
    "suffix",
    [".png", ".apng", ".jpg", ".jpe", ".jfif", ".gif", ".avif", ".ppm", ".pnm", ".tga", ".webp", ".bmp", ".tif"],
)
def test_what_pillow_reads_is_an_image_everywhere(tmp_path, suffix):
    path = tmp_path / f"photo{suffix.upper()}"
    save(path, format="PNG") if suffix == ".apng" else save(path)
    assert list_images(tmp_path) == match_images(str(tmp_path / "*.*")) == [path]
    assert read_image(path).pixels.shape == (7, 9, 3)
    assert read_header(path) == (7, 9, np.uint8)
    assert len(dataset.ImageFolder(tmp_path)) == len(stream.ImageStream(tmp_path)) == 1
    assert runner.read_float(path).shape == (7, 9, 3)


def test_one_list_of_suffixes():
    assert dataset.IMAGE_SUFFIXES is stream.IMAGE_SUFFIXES is runner.IMAGE_SUFFIXES is formats.IMAGE_SUFFIXES
    assert set(formats.WRITTEN_SUFFIXES) < set(formats.IMAGE_SUFFIXES)
    assert len(set(formats.IMAGE_SUFFIXES)) == len(formats.IMAGE_SUFFIXES)


def test_what_is_left_out_is_counted_and_named(tmp_path):
    save(tmp_path / "a.png")
    for name in ("notes.txt", "IMG_1.HEVC", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to("nowhere")
    for listed in (lambda: list_images(tmp_path), lambda: match_images(f"{tmp_path}/*")):
        with pytest.warns(UserWarning, match=rf"{LEFT_OUT}: 3 \(IMG_1.HEVC, gone.png, notes.txt\)$"):
            assert listed() == [tmp_path / "a.png"]


def test_many_files_are_counted_by_suffix(tmp_path):
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_bytes(b"")
    (tmp_path / "x.md").write_bytes(b"")
    with pytest.warns(UserWarning, match=r": 13 \(00.txt, .*09.txt, and 2 more of .txt, and 1 more of .md\)$"):
        assert find_images(tmp_path) == []


def test_a_missing_plugin_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "IMAGE_SUFFIXES", (".png",))  # as where pillow-heif is not installed
    (tmp_path / "photo.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.warns(UserWarning, match=r"photo.heic \(needs pillow-heif\)"):
        monkeypatch.setattr(files, "IMAGE_SUFFIXES", (".png",))
        assert find_images(tmp_path) == []
    with pytest.raises(ValueError, match="got a file that is HEIC, which needs pillow-heif$"):
        read_image(tmp_path / "photo.heic")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b"some words\n", "text"),
        (b"\0" * 100, "nothing but zeros"),
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"<svg></svg>", "SVG"),
        (b"%PDF-1.7\n", "PDF"),
        (b"\xff\x0a\x00", "JPEG XL"),
        (b"\0\0\0\x18ftypisom", "a video"),
        (b"PK\x03\x04abc", "a ZIP archive"),
        (b"\x8a\x01\xfe", "damaged, or of an unknown kind"),
    ],
)
def test_a_file_that_is_no_image_is_told_what_it_is(tmp_path, content, kind):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"x.png: it must be one of PNG, .*; got a file that is {kind}$"):
        read_image(tmp_path / "x.png")


def test_a_format_that_only_pillow_knows_is_named(tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "x.pcx")
    with pytest.raises(ValueError, match="got a file that is PCX, which is not read"):
        read_image(tmp_path / "x.pcx")


@pytest.mark.parametrize(
    "content",
    [
        b"P6 2 1 65535\n" + bytes(12),
        b"P6 2 1 1023\n" + bytes(12),
        b"P5 2 1 65535\n" + bytes(4),
        b"P3 1 1 1023\n 1 2 1000\n",
    ],
)
def test_depth_is_never_reduced_in_silence(tmp_path, content):
    (tmp_path / "x.ppm").write_bytes(content)
    for read in (read_image, read_header):
        with pytest.raises(ValueError, match="it must have 8 bits for a file of this format; got 16"):
            read(tmp_path / "x.ppm")


TEN_BITS = (  # an AVIF of 2 x 2 pixels
    r"0000WW^{RQVRmU|00000VRmU|ZE0pPZE0a<O+hh10002%ZDn*}000000000XXk=`10000000000aA{+700000000000000000000"
    r"4sdC7Z2$lO000310016oY;R)#0000)000310RR910RR926951JApigXC~0YKW&i*H00031000_kZf0cy000000RRADb}%tRZ)|UJ"
    r"00000YH4tCZ~y=ROKEUpZvX%Q6lrsCWdHyG000000ssI20ssI25O8UDX#fBK00RmN3IG5A3}JRLLxCVb000006Ju{|a&BX6cmM(b"
    r"0ssJj0000NX>e^}0000000001009I60)qqq001d%WMOm?015{<06uUaAPF)Q5C8xG5BQE=4HD&wjQ+?u<q!D4"
)


def test_an_avif_of_ten_bits_is_refused(tmp_path):
    (tmp_path / "x.avif").write_bytes(base64.b85decode(TEN_BITS))
    for read in (read_image, read_header):
        with pytest.raises(ValueError, match="it must have 8 bits for a file of this format; got 10"):
            read(tmp_path / "x.avif")


def test_links_are_followed_and_no_folder_is_listed_twice(tmp_path):
    save(tmp_path / "far" / "sub" / "b.png")
    save(tmp_path / "data" / "a.png")
    (tmp_path / "data" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "far" / "sub")
    (tmp_path / "far" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "c.png").symlink_to(tmp_path / "data" / "a.png")
    found = [path.relative_to(tmp_path / "data") for path in list_images(tmp_path / "data", recursive=True)]
    assert [str(path) for path in found] == ["a.png", "again/b.png", "c.png"]


def test_labels_of_a_shard_are_not_left_out_but_lonely_files_are(tmp_path):
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(buffer, "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name in ("d/1.png", "d/1.txt", "d/1.seg.json", "d/2.heix"):
            member = tarfile.TarInfo(name)
            member.size = len(buffer.getvalue())
            archive.addfile(member, io.BytesIO(buffer.getvalue()))
    with pytest.warns(UserWarning, match=rf"{LEFT_OUT}: 1 \(2.heix\)"):
        assert len(list_shard(tmp_path / "x.tar")) == 1
    save(tmp_path / "a.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert len(stream.ImageStream(tmp_path)) == 2
    assert len(caught) == 1 and "2.heix" in str(caught[0].message)  # the shard itself is not left out


def test_targets_by_exact_name_then_by_an_unambiguous_stem(tmp_path):
    inputs = [tmp_path / name for name in ("1.png", "1.bmp", "2.png", "3.png", "4.jpg", "4.png", "5.png")]
    targets = [tmp_path / "t" / name for name in ("1.bmp", "1.png", "2.tif", "3.bmp", "3.tif", "4.bmp")]
    assert partner_of(inputs[0], inputs, targets) == targets[1]
    assert partner_of(inputs[1], inputs, targets) == targets[0]
    assert partner_of(inputs[2], inputs, targets) == targets[2]
    for path, got in ((inputs[3], "3.bmp, 3.tif for 3.png"), (inputs[4], "4.bmp for 4.jpg, 4.png")):
        with pytest.raises(ValueError, match=f"target must hold one image by the name of each input; got {got}"):
            partner_of(path, inputs, targets)
    with pytest.raises(ValueError, match="target must hold an image by the name of each input; got none for 5.png"):
        partner_of(inputs[6], inputs, targets)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_no_image(tmp_path):
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    with pytest.warns(UserWarning, match=r": 1 \(b.png\)"):
        assert list_images(tmp_path) == [tmp_path / "a.png"]
