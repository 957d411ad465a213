"""Folders as they are found: every kind of file is decoded as Pillow does or named as bad, and none does harm."""

import contextlib
import gc
import io
import os
import socket
import struct
import warnings
import zlib

import numpy as np
import pytest
from data_samples import png
from PIL import Image, ImageOps

from jit_accel.data import build_loader, open_images
from jit_accel.data.batches.order import image_indices
from jit_accel.data.reading.decode import BadImage, decode_image

SIZE = 32
NOISE = np.random.default_rng(1)


def smooth(height=SIZE, width=SIZE, channels=3):
    """A picture that JPEG keeps."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    planes = [127 + 120 * np.sin(3 * x + 5 * y + channel) for channel in range(channels)]
    return np.stack(planes, -1).astype(np.uint8)


def noise(*shape, dtype=np.uint8):
    return NOISE.integers(0, np.iinfo(dtype).max + 1, shape, dtype)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, format, **options)
    return buffer.getvalue()


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of_rows(width, height, depth, colour, rows, *extra, interlace=0):
    """A PNG that Pillow cannot write."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    return b"".join(
        [b"\x89PNG\r\n\x1a\n", header, *extra, png_chunk(b"IDAT", zlib.compress(rows, 9)), png_chunk(b"IEND", b"")]
    )


def rgb_png(pixels, *extra):
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    depth = 8 * pixels.dtype.itemsize
    return png_of_rows(pixels.shape[1], pixels.shape[0], depth, 2, rows, *extra)


def interlaced_png(pixels):
    """All seven passes of Adam7."""
    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    rows = b"".join(
        b"\0" + np.ascontiguousarray(row).tobytes() for x, y, dx, dy in passes for row in pixels[y::dy, x::dx]
    )
    return png_of_rows(pixels.shape[1], pixels.shape[0], 8, 2, rows, interlace=1)


def adobe_jpeg(transform, planes):
    """A JPEG of four channels whose Adobe marker says 0 (CMYK) or 2 (YCCK)."""
    data = bytearray(encoded(Image.merge("CMYK", [Image.fromarray(plane) for plane in planes]), "JPEG", quality=95))
    marker = data.index(b"Adobe")
    data[marker + 11] = transform
    return bytes(data)


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def bomb(side):
    """A PNG of side x side black pixels: rows that are never read need not be there."""
    return png_of_rows(side, side, 1, 0, b"\0" * 1000)


def read(folder):
    """What one epoch through the loader gives: {file name: picture}, and the bad images."""
    source = open_images(folder)
    loader = build_loader(source, img_size=SIZE, batch_size=source.num_images, seed=0, horizontal_flip=False)
    batch = next(loader)
    names = [os.path.basename(row["image"]["path"]) for row in source.images.dataset]
    indices = image_indices(0, batch.positions, source.num_images)
    pictures = {names[index]: picture for index, picture in zip(indices, batch.images.numpy())}
    bad = {os.path.basename(text.partition(": ")[0]): text.partition(": ")[2] for text in batch.bad_images}
    return {name: picture for name, picture in pictures.items() if name not in bad}, bad


def as_pillow_does(data):
    """The first frame of an image of SIZE x SIZE, upright, in RGB on white, by Pillow's own conversions."""
    with Image.open(io.BytesIO(data)) as image:
        image.seek(0)
        image = ImageOps.exif_transpose(image)
        if image.has_transparency_data:
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


ALPHA = np.dstack([noise(SIZE, SIZE, 3), noise(SIZE, SIZE)])
FRAMES = [Image.fromarray(noise(SIZE, SIZE, 3)) for _ in range(3)]
PALETTE = Image.fromarray(noise(SIZE, SIZE, 3)).quantize(64)
GREY = noise(SIZE, SIZE)


def animated(format, **options):
    return encoded(FRAMES[0], format, save_all=True, append_images=FRAMES[1:], **options)


DECODABLE = {
    "grey.png": encoded(GREY),
    "grey.jpg": encoded(smooth()[..., 0], "JPEG"),
    "one bit.png": encoded(Image.fromarray(GREY > 127)),
    "grey and alpha.png": encoded(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA[..., 3])])),
    "palette.png": encoded(PALETTE),
    "palette, one colour transparent.png": encoded(PALETTE, transparency=5),
    "palette with alpha.png": encoded(PALETTE, transparency=bytes(range(0, 256, 4))),
    "palette.gif": encoded(PALETTE, "GIF", transparency=5),
    "alpha.png": encoded(ALPHA),
    "alpha.webp": encoded(ALPHA, "WEBP", lossless=True),
    "alpha.tif": encoded(ALPHA, "TIFF", compression="tiff_lzw"),
    "cmyk.jpg": encoded(Image.fromarray(smooth()).convert("CMYK"), "JPEG"),
    "cmyk.tif": encoded(Image.fromarray(smooth()).convert("CMYK"), "TIFF"),
    "ycck.jpg": adobe_jpeg(2, smooth(channels=4).transpose(2, 0, 1)),
    "lab.tif": encoded(Image.merge("LAB", [Image.fromarray(plane) for plane in smooth().transpose(2, 0, 1)]), "TIFF"),
    "16 bits.png": rgb_png(noise(SIZE, SIZE, 3, dtype=np.uint16).astype(">u2")),
    "animated.gif": animated("GIF"),
    "animated.webp": animated("WEBP", lossless=True),
    "animated.apng": animated("PNG"),
    "pages.tiff": animated("TIFF"),
    "lzw.tiff": encoded(noise(SIZE, SIZE, 3), "TIFF", compression="tiff_lzw"),
    "in a tiff.tiff": encoded(smooth(), "TIFF", compression="jpeg"),
    "plain.bmp": encoded(noise(SIZE, SIZE, 3), "BMP"),
    "plain.ppm": encoded(noise(SIZE, SIZE, 3), "PPM"),
    "wavelets.jp2": encoded(noise(SIZE, SIZE, 3), "JPEG2000"),
    "png.jpg": encoded(noise(SIZE, SIZE, 3)),
    "jpeg.png": encoded(smooth(), "JPEG"),
    "icon.png": encoded(noise(SIZE, SIZE, 3), "ICO", sizes=[(SIZE, SIZE)]),
    "interlaced.png": interlaced_png(noise(SIZE, SIZE, 3)),
    "progressive.jpg": encoded(smooth(), "JPEG", progressive=True),
    "trailing.jpg": encoded(smooth(), "JPEG") + b"\0garbage" * 999,
    "broken profile.png": rgb_png(noise(SIZE, SIZE, 3), png_chunk(b"iCCP", b"name\0\0not deflated")),
    "large profile.png": encoded(noise(SIZE, SIZE, 3), icc_profile=NOISE.bytes(3_000_000)),
    "large profile.jpg": encoded(smooth(), "JPEG", icc_profile=NOISE.bytes(3_000_000)),
    "a b\tc\nd.png": encoded(noise(SIZE, SIZE, 3)),
    "猫🐈é.png": encoded(noise(SIZE, SIZE, 3)),
    **{f"turned {turn}.jpg": encoded(smooth(), "JPEG", exif=turned(turn)) for turn in range(1, 9)},
}

BAD = {
    "empty.jpg": (b"", "empty"),
    "page.jpg": (b"<html>404 not found</html>", "not an image"),
    "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
    "phone.jpg": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "convert it to JPEG or PNG"),
    "half.png": (encoded(noise(64, 64, 3))[:6000], "truncated"),
    "half.jpg": (encoded(smooth(64, 64), "JPEG")[:-200], "truncated"),
    "header.jpg": (encoded(smooth(), "JPEG")[:40], ""),
    "half.webp": (encoded(noise(64, 64, 3), "WEBP")[:2000], ""),
    "half.gif": (encoded(PALETTE, "GIF")[:900], "truncated"),
    "half.tif": (encoded(noise(64, 64, 3), "TIFF", compression="tiff_lzw")[:3000], ""),
    "broken checksum.png": (rgb_png(noise(64, 64, 3), png_chunk(b"tEXt", b"key\0value")[:-4] + b"\0\0\0\0"), ""),
    "bomb.png": (bomb(60_000), "decompression bomb"),
    "floats.tif": (encoded(np.ones((8, 8), np.float32), "TIFF"), "floating-point"),
}


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("messy")
    for name, data in DECODABLE.items():
        (folder / name).write_bytes(data)
    for name, (data, _) in BAD.items():
        (folder / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read(folder)


@pytest.mark.parametrize("name", DECODABLE)
def test_what_pillow_can_show_is_decoded_as_pillow_does(messy, name):
    pictures, bad = messy
    assert name not in bad, bad[name]
    assert np.array_equal(pictures[name], as_pillow_does(DECODABLE[name]))


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_whole_image_is_named_with_its_reason(messy, name):
    pictures, bad = messy
    assert name not in pictures
    assert BAD[name][1].lower() in bad[name].lower()


def test_each_orientation_shows_the_same_picture(tmp_path):
    """The picture is stored as each orientation says it would be, by NumPy, and comes out upright."""
    picture = noise(SIZE, SIZE, 3)
    stored = {1: lambda p: p, 2: np.fliplr, 3: lambda p: np.rot90(p, 2), 4: np.flipud, 5: lambda p: p.swapaxes(0, 1)}
    stored |= {6: np.rot90, 7: lambda p: np.rot90(p, 2).swapaxes(0, 1), 8: lambda p: np.rot90(p, -1)}
    for turn, store in stored.items():
        (tmp_path / f"{turn}.png").write_bytes(encoded(np.ascontiguousarray(store(picture)), exif=turned(turn)))
    pictures, bad = read(tmp_path)
    assert not bad
    assert all((shown == picture.transpose(2, 0, 1)).all() for shown in pictures.values())
    assert len(pictures) == 8


def test_cmyk_and_ycck_show_the_colours_that_were_stored():
    colours = smooth()
    shown = decode_image(encoded(Image.fromarray(colours).convert("CMYK"), "JPEG", quality=100), SIZE)
    assert np.abs(shown.astype(int) - colours.transpose(2, 0, 1)).mean() < 3
    black = np.zeros((SIZE, SIZE), np.uint8)
    # YCC is that of cyan, magenta and yellow; Pillow stores 255 - plane
    ycc = np.asarray(Image.fromarray(255 - colours).convert("YCbCr")).transpose(2, 0, 1)
    shown = decode_image(adobe_jpeg(2, [*(255 - ycc), black]), SIZE)
    assert np.abs(shown.astype(int) - colours.transpose(2, 0, 1)).mean() < 3


def test_sixteen_bit_colours_keep_their_upper_eight():
    pixels = noise(SIZE, SIZE, 3, dtype=np.uint16)
    assert (decode_image(rgb_png(pixels.astype(">u2")), SIZE) == (pixels >> 8).transpose(2, 0, 1)).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (2, 30_000), (30_000, 2), (3, 2)])
def test_tiny_and_extreme_shapes_keep_their_colour(tmp_path, shape):
    (tmp_path / "a.png").write_bytes(encoded(np.full((*shape, 3), (10, 200, 30), np.uint8)))
    pictures, bad = read(tmp_path)
    assert not bad
    assert (pictures["a.png"] == np.array([10, 200, 30])[:, None, None]).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_truncated_file_is_bad_or_misses_nothing(format):
    """A cut behind the last pixel does not show; a grey or black rest never becomes a training image."""
    options = {"progressive": True} if format == "JPEG" else {}
    for data in {encoded(noise(64, 64, 3), format), encoded(smooth(64, 64), format, **options)}:
        whole, survivors = decode_image(data, SIZE), 0
        for length in range(1, len(data), max(1, len(data) // 40)):
            try:
                survivors += 1
                assert (decode_image(data[:length], SIZE) == whole).all(), length
            except BadImage:
                survivors -= 1
        assert survivors < 4


def test_a_png_with_a_flipped_bit_is_bad():
    data = encoded(noise(64, 64, 3))
    start, end = data.index(b"IDAT"), data.index(b"IEND")
    for place in range(start + 4, end - 4, 97):
        damaged = bytearray(data)
        damaged[place] ^= 1
        with pytest.raises(BadImage):
            decode_image(bytes(damaged), SIZE)


def test_pictures_up_to_twice_pillows_limit_are_decoded_in_silence(monkeypatch):
    data = encoded(np.zeros((100, 150, 3), np.uint8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
        assert (decode_image(data, SIZE) == 0).all()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7_000)
    with pytest.raises(BadImage, match="decompression bomb"):
        decode_image(data, SIZE)


def test_decoding_leaves_the_terminal_alone(capfd):
    for data in [*DECODABLE.values(), *(data for data, _ in BAD.values())]:
        for cut in (len(data), len(data) // 2):
            with contextlib.suppress(BadImage):
                decode_image(data[:cut], SIZE)
    assert capfd.readouterr() == ("", "")


# What is not a file, and files that nobody means


def test_links_are_followed_and_dead_ones_named(tmp_path, caplog):
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere.png").write_bytes(png(3))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "elsewhere.png")
    (tmp_path / "data" / "dead.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "data" / "circle.png").symlink_to(tmp_path / "data" / "circle.png")
    (tmp_path / "data" / "up").symlink_to(tmp_path / "data")
    pictures, bad = read(tmp_path / "data")
    assert set(pictures) == {"link.png"}
    assert not bad
    assert "2 files or folders cannot be read and are skipped" in caplog.text


def test_pipes_sockets_and_folders_named_like_images_do_no_harm(tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket may not be long
    (tmp_path / "a.png").write_bytes(png(1))
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket.jpg")
        pictures, bad = read(tmp_path)
    assert set(pictures) == {"a.png"}
    assert not bad
    assert "2 files or folders cannot be read" in caplog.text
    assert "neither a file nor a folder" in caplog.text


@pytest.mark.parametrize("change", [os.mkfifo, os.mkdir, lambda path: None, lambda path: os.symlink(path, path)])
def test_what_happens_to_a_file_after_the_start_makes_it_bad(tmp_path, change):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    source = open_images(tmp_path)
    (tmp_path / "1.png").unlink()
    change(tmp_path / "1.png")
    batch = next(build_loader(source, img_size=SIZE, batch_size=3, seed=0))
    assert [text.partition(": ")[0] for text in batch.bad_images] == [str(tmp_path / "1.png")]


def test_files_of_cameras_and_systems_are_passed_over(tmp_path, caplog):
    (tmp_path / "a.png").write_bytes(png(1))
    for name in ("._a.png", ".hidden.png", "Thumbs.db", ".DS_Store", "desktop.ini", "IMG_1.HEIC", "IMG_2.heic"):
        (tmp_path / name).write_bytes(b"no image")
    pictures, bad = read(tmp_path)
    assert set(pictures) == {"a.png"}
    assert not bad
    assert "2 x .heic cannot be decoded and are left out: convert them to JPEG or PNG" in caplog.text


def test_names_that_are_not_utf8_are_named(tmp_path, caplog):
    (tmp_path / "a.png").write_bytes(png(1))
    for name in (b"/\xff.png", b"/\xfe/b.png"):
        path = os.fsencode(tmp_path) + name
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(png(2))
    pictures, _ = read(tmp_path)
    assert set(pictures) == {"a.png"}
    assert "2 files or folders cannot be read" in caplog.text
    assert "not UTF-8" in caplog.text


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_files_without_permission_are_bad(tmp_path):
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "1.png").chmod(0)
    pictures, bad = read(tmp_path)
    assert "Permission denied" in bad["1.png"]
    assert set(pictures) == {"0.png"}


# Leaks


def open_files():
    return len(os.listdir("/proc/self/fd"))


def memory_mib():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts through /proc")
def test_decoding_good_and_bad_files_leaks_nothing(tmp_path):
    small = {name: data for name, data in DECODABLE.items() if len(data) < 2**20}
    for name, data in {**small, **{name: data for name, (data, _) in BAD.items()}}.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe")
    paths = [str(path) for path in tmp_path.iterdir()]

    def decode_all(times):
        for _ in range(times):
            for path in paths:
                with contextlib.suppress(BadImage):
                    decode_image(path, SIZE)

    gc.disable()
    try:
        decode_all(10)
        files, memory = open_files(), memory_mib()
        decode_all(50)
        assert open_files() == files
    finally:
        gc.enable()
    gc.collect()
    assert memory_mib() - memory < 16
