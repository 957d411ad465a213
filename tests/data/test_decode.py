"""Any picture becomes ADM's centre crop in RGB, or a BadImage."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jit_accel.data.reading import decode
from jit_accel.data.reading.decode import BadImage, decode_image

NOISE = np.random.default_rng(0)


def noise(height, width, channels=3):
    pixels = NOISE.integers(0, 256, (height, width, channels), np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def adm_in_plain_steps(pixels, size):
    """The crop of ADM, by block means in NumPy and slices, where the decoder uses Pillow's crop."""
    while min(pixels.shape[:2]) >= 2 * size:
        height, width = pixels.shape[0] // 2, pixels.shape[1] // 2
        pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.BOX))
    scale = size / min(pixels.shape[:2])
    height, width = round(pixels.shape[0] * scale), round(pixels.shape[1] * scale)
    pixels = np.asarray(Image.fromarray(pixels).resize((width, height), Image.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size].transpose(2, 0, 1)


@pytest.mark.parametrize(
    ("height", "width"), [(40, 40), (100, 37), (37, 100), (64, 65), (257, 130), (31, 33), (16, 200), (5, 7), (1, 16)]
)
def test_the_crop_is_adms(height, width):
    pixels = noise(height, width)
    cropped = decode_image(encoded(Image.fromarray(pixels)), 32)
    assert cropped.shape == (3, 32, 32)
    assert cropped.dtype == np.uint8
    assert (cropped == adm_in_plain_steps(pixels, 32)).all()


def test_halving_is_the_mean_of_two_by_two_pixels():
    pixels = noise(64, 64)
    means = pixels.reshape(32, 2, 32, 2, 3).astype(float).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(decode_image(encoded(Image.fromarray(pixels)), 32) - means).max() <= 1  # rounded once an axis


def test_an_image_of_the_size_is_unchanged():
    pixels = noise(32, 32)
    assert (decode_image(encoded(Image.fromarray(pixels)), 32) == pixels.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("turned", [False, True])
def test_a_strip_is_cropped_before_it_is_blown_up(turned, monkeypatch):
    image = np.zeros((3, 3000, 3), np.uint8)
    image[:, 1000:2000] = 200
    strip = Image.fromarray(np.ascontiguousarray(image.transpose(1, 0, 2)) if turned else image)
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, *args: sizes.append(size) or resize(self, size, *args)
    )
    assert (decode_image(encoded(strip), 32) == 200).all()
    assert [max(size) for size in sizes] == [16 * 32]


def test_grey_becomes_three_equal_channels():
    grey = noise(32, 32, 1)
    assert (decode_image(encoded(Image.fromarray(grey)), 32) == grey).all()


def test_one_bit_is_black_and_white():
    bits = NOISE.integers(0, 2, (32, 32)).astype(bool)
    assert (decode_image(encoded(Image.fromarray(bits)), 32) == bits * 255).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_to_eight(format):
    grey = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    assert (decode_image(encoded(Image.fromarray(grey), format), 32) == np.rint(grey / 257)).all()


def test_palette_shows_its_colours():
    image = Image.fromarray(noise(32, 32)).quantize(16)
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    assert (decode_image(encoded(image, "GIF"), 32) == expected).all()


def test_transparency_shows_white():
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:16] = (10, 20, 30, 255)
    rgba[16:24, :, 3] = 128  # half-transparent black
    pixels = decode_image(encoded(Image.fromarray(rgba, "RGBA")), 32)
    assert pixels[:, 0, 0].tolist() == [10, 20, 30]
    assert pixels[:, 20, 0].tolist() == [127] * 3
    assert pixels[:, 31, 0].tolist() == [255] * 3


@pytest.mark.parametrize("mode", ["P", "RGB", "L"])
def test_a_transparent_colour_shows_white(mode):
    image = Image.new(mode, (32, 32), {"RGB": (9, 9, 9)}.get(mode, 9))
    image.paste({"RGB": (40, 40, 40)}.get(mode, 40), (0, 0, 16, 32))
    if mode == "P":
        image.putpalette([value for i in range(256) for value in (i, i, i)])
    pixels = decode_image(encoded(image, transparency={"RGB": (9, 9, 9)}.get(mode, 9)), 32)
    assert pixels[:, 0, 0].tolist() == [40] * 3
    assert pixels[:, 0, 31].tolist() == [255] * 3


def test_grey_with_alpha_shows_white():
    image = Image.merge("LA", [Image.new("L", (32, 32), 40), Image.new("L", (32, 32), 0)])
    assert (decode_image(encoded(image), 32) == 255).all()


def test_cmyk_is_converted_as_pillow_does():
    image = Image.fromarray(noise(32, 32)).convert("CMYK")
    data = encoded(image, "JPEG", quality=95)
    with Image.open(io.BytesIO(data)) as stored:
        assert stored.mode == "CMYK"
        expected = np.asarray(stored.convert("RGB")).transpose(2, 0, 1)
    assert (decode_image(data, 32) == expected).all()


def test_exif_orientation_is_applied():
    pixels = noise(32, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise
    data = encoded(Image.fromarray(pixels), exif=exif)
    assert (decode_image(data, 32) == np.rot90(pixels, -1).transpose(2, 0, 1)).all()


def test_damaged_exif_is_ignored():
    pixels = noise(32, 32)
    data = encoded(Image.fromarray(pixels), exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff nonsense")
    assert (decode_image(data, 32) == pixels.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(format):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    assert decode_image(data, 32)[:, 5, 5].tolist() == [255, 0, 0]


def test_a_wrong_file_ending_does_not_matter(tmp_path):
    (tmp_path / "ünï.jpg").write_bytes(encoded(Image.new("RGB", (32, 32), (1, 2, 3))))
    assert decode_image(str(tmp_path / "ünï.jpg"), 32)[:, 0, 0].tolist() == [1, 2, 3]


def png_header_of(width, height):
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))


BAD = {
    "empty": b"",
    "nothing": None,
    "not an image": b"<html>404 not found</html>",
    "truncated PNG": encoded(Image.fromarray(noise(64, 64)))[:-4000],
    "truncated JPEG": encoded(Image.fromarray(noise(64, 64)), "JPEG")[:-1000],
    "header only": png_header_of(64, 64),
    "decompression bomb": png_header_of(100_000, 100_000),
    "floating point": encoded(Image.fromarray(np.ones((8, 8), np.float32)), "TIFF"),
    "no such file": "/nowhere/at/all.png",
}


@pytest.mark.parametrize("kind", BAD)
def test_what_cannot_be_decoded_is_a_bad_image_with_a_constant_reason(kind):
    reasons = set()
    for _ in range(2):
        with pytest.raises(BadImage) as caught:
            decode_image(BAD[kind], 32)
        reasons.add(str(caught.value))
    assert len(reasons) == 1
    assert reasons.pop()


def pillows(data):
    """The exact crop as Pillow alone decodes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "simplejpeg", None)
        return decode_image(data, 32)


@pytest.mark.parametrize(
    "options", [{}, {"subsampling": 0}, {"subsampling": 1}, {"progressive": True}, {"quality": 30}]
)
@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (100, 75), (8, 300)])
def test_simplejpeg_gives_what_pillow_gives(options, height, width):
    pytest.importorskip("simplejpeg")
    smooth = Image.fromarray(noise(5, 5)).resize((width, height), Image.BICUBIC)
    for picture in (smooth, Image.fromarray(noise(height, width))):
        data = encoded(picture, "JPEG", **options)
        assert decode.plain_jpeg(io.BytesIO(data)).shape == (height, width, 3)
        assert (decode_image(data, 32) == pillows(data)).all()
        assert (decode_image(data + b"trailing bytes", 32) == pillows(data)).all()


def test_jpegs_that_are_no_plain_colour_or_damaged_are_left_to_pillow():
    pytest.importorskip("simplejpeg")
    picture = Image.fromarray(noise(40, 50))
    exif = Image.Exif()
    exif[0x0112] = 6
    others = [
        encoded(picture, "JPEG", exif=exif),
        encoded(picture.convert("L"), "JPEG"),
        encoded(picture.convert("CMYK"), "JPEG"),
        encoded(picture, "PNG"),
    ]
    for data in others:
        assert decode.plain_jpeg(io.BytesIO(data)) is None
        assert (decode_image(data, 32) == pillows(data)).all()
    whole = encoded(picture, "JPEG")
    for length in range(0, len(whole) - 2, 97):
        assert decode.plain_jpeg(io.BytesIO(whole[:length])) is None
        with pytest.raises(BadImage):
            decode_image(whole[:length], 32)


def test_no_interpreter_is_started_for_postscript(monkeypatch):
    """Pillow would run Ghostscript on bytes from anywhere, which may never end."""
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n{ } loop\n"
    assert Image.open(io.BytesIO(eps)).format == "EPS"
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(BadImage, match="not an image"):
        decode_image(eps, 32)


def test_an_orientation_in_xmp_counts_as_pillow_counts_it():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    data = encoded(Image.fromarray(noise(40, 60)), "JPEG", quality=95, xmp=xmp)
    turned = encoded(Image.open(io.BytesIO(data)).convert("RGB").transpose(Image.Transpose.ROTATE_270))
    assert (decode_image(data, 32) == decode_image(turned, 32)).all()
    assert (decode_image(data, 32) == pillows(data)).all()
