"""Names on sheets are drawn with letters, or not at all."""

import unicodedata

import numpy as np
import pytest
from PIL import ImageFont

from jit_accel.base import image_rows
from jit_accel.base.image_rows import draw_rows, font_file, font_for, legible

GREY = [np.full((84, 84, 3), 200, np.uint8)]


def drawn(name):
    return np.asarray(draw_rows([(name, GREY)]))


@pytest.mark.parametrize("name", ["Käse", "naïve", "łódź", "Ωmega", "кошка"])
def test_letters_beyond_ascii_are_drawn(name):
    """Letters that a font lacks are all drawn as one box."""
    assert legible(name, 3) == name
    font = font_for(name, 30)
    missing = bytes(font.getmask("\U0010ffff"))
    assert all(bytes(font.getmask(letter)) != missing for letter in name)
    assert np.array_equal(drawn(unicodedata.normalize("NFC", name)), drawn(name))
    assert legible(unicodedata.normalize("NFD", name), 3) == name


def test_plain_names_are_drawn_as_before():
    assert font_file("plain name …") == ""
    assert font_for("plain", 14).getname() == ImageFont.load_default(14).getname()


def test_a_class_that_no_font_can_write_is_drawn_as_its_number(monkeypatch):
    fonts = image_rows._fonts()[:1]
    monkeypatch.setattr(image_rows, "_fonts", lambda: fonts)
    font_file.cache_clear()
    assert legible("猫", 7) == "7"
    assert drawn("7").shape == drawn(legible("猫", 7)).shape
    font_file.cache_clear()


def test_a_name_is_drawn_in_one_line_of_what_can_be_printed():
    assert legible("a\tb\n c", 3) == "a b c"
    assert legible("a\x07b", 3) == "3"


def test_fonts_of_the_system_are_asked_for_other_letters(monkeypatch):
    monkeypatch.setattr(image_rows, "_fonts", lambda: ["a.ttf", "b.ttf"])
    monkeypatch.setattr(image_rows, "_letters_of", {"a.ttf": set("ab"), "b.ttf": {ord("猫")}}.get)
    font_file.cache_clear()
    assert (font_file("猫"), font_file("犬")) == ("b.ttf", None)
    font_file.cache_clear()
