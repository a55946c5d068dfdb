import numpy as np
import pytest
from PIL import Image, ImageFont

from dqe_jax.evaluation import contact_sheet as sheet
from dqe_jax.evaluation.drawing import clean, fit_image, wrap

pytestmark = pytest.mark.core


def image(value=128, height=64, width=64):
    return np.full((height, width, 3), value, np.uint8)


def colors(picture):
    return {color for _, color in picture.getcolors(picture.width * picture.height)}


GREEN, TEAL, GREY, RED = (
    tuple(bytes.fromhex(c[1:]))
    for c in (*(sheet._FRAMES[m] for m in ("target", "relevant", "reference")), sheet._MISSED)
)


def row(marks=("", "target"), **kwargs):
    results = [sheet.SheetResult(image(20 * i), mark) for i, mark in enumerate(marks)]
    return sheet.SheetRow(**{"reference": image(), "text": "red", "results": results} | kwargs)


def test_frames_tell_what_a_result_is():
    def framed(*marks):
        # Below the legend, which has a swatch of every frame.
        picture = sheet.draw_contact_sheet([row(marks)])
        return colors(picture.crop((0, 80, *picture.size))) & {GREEN, TEAL, GREY, RED}

    assert framed("", "") == set()
    assert framed("", "target") == {GREEN}
    assert framed("relevant", "", "reference") == {TEAL, GREY}
    assert framed("relevant", "target", "reference") == {TEAL, GREY, GREEN}


def test_missed_target_is_drawn_at_the_end():
    marks = [""] * 10 + ["target"]
    found = sheet.draw_contact_sheet([row(["target"], target=image())])
    missed = sheet.draw_contact_sheet([row(marks, target=image(), target_rank=11)])
    assert RED not in colors(found)
    assert RED in colors(missed)
    assert missed.width > found.width
    assert GREEN not in colors(missed.crop((0, 80, *missed.size)))
    # Without a target image there is nothing to draw.
    assert sheet.draw_contact_sheet([row(marks)]).size == found.size


def test_rank_labels():
    assert sheet._rank_label(row(target_rank=37, depth=50)) == "rank 37"
    assert sheet._rank_label(row(depth=50)) == "rank > 50"
    assert sheet._rank_label(row()) == "not found"


def test_sheet_row_marks_results():
    asked = []

    def gallery(index):
        asked.append(index)
        return image(index)

    args = {"reference": 4, "text": "t", "relevant": np.array([2, 4, 7, 9]), "shown": 4}
    ranked = np.array([4, 7, 1, 9, 2, 6, -1])
    made = sheet.sheet_row(gallery, ranked, target=9, **args)
    assert [result.mark for result in made.results] == ["reference", "relevant", "", "target"]
    assert [int(result.image[0, 0, 0]) for result in made.results] == [4, 7, 1, 9]
    assert (made.target_rank, made.depth) == (4, 6)
    assert set(asked) == {4, 7, 1, 9}
    assert sheet.sheet_row(gallery, ranked, target=6, **args).target_rank == 6
    assert sheet.sheet_row(gallery, ranked, target=30, **args).target_rank is None


def test_any_text_weights_and_sizes(tmp_path):
    rows = [
        row(text="", results=[]),
        row(text="été “quoted” 日本語 🙂 \ud800 \x00\n\ttab naïve"),
        row(text="word " * 200, weights={"color": 0.0, "shape": 1.0, "大きさ" * 20: 7.0}),
        row(text="x" * 500, weights={"nan": float("nan"), "low": -1.0}, reference=image(1, 1, 1)),
        row(reference=image(1, 3, 400), target=image(1, 777, 5)),
    ]
    path = tmp_path / "sheet.png"
    picture = sheet.draw_contact_sheet(rows, path, title="Ünïcode")
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(picture))
    small = sheet.draw_contact_sheet(rows, columns=3, cell=32)
    assert small.width < picture.width / 3


def test_characters_that_the_font_lacks_are_replaced():
    assert clean("a  b\n\tc\x00") == "a b c"
    assert clean("naïve") in ("naïve", "naive")
    assert clean("日\ud800") == "??"
    assert clean("≠") in ("≠", "?")  # and never "="


@pytest.mark.parametrize("text", ["a few plain words", "a " + "w" * 90 + " b", "字" * 60, " ", "x"])
def test_wrap_by_pixels(text):
    font = ImageFont.load_default(size=17)
    lines = wrap(text, font, 100, max_lines=50)
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    cut = wrap(text, font, 100, max_lines=2)
    assert len(cut) <= 2
    assert all(font.getlength(line) <= 100 for line in cut)
    assert cut == lines if len(lines) <= 2 else cut[-1].endswith("…")


def test_fit_image():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    fitted = np.asarray(fit_image(pixels, 96))
    np.testing.assert_array_equal(fitted, pixels.repeat(3, axis=0).repeat(3, axis=1))
    tall = np.asarray(fit_image(image(0, 200, 100), 96))
    assert (tall[:, 24:72] == 0).all()
    assert (tall[:, :24] != 0).all()
    assert (tall[:, 72:] != 0).all()
    for bad in (image().astype(np.float32), image()[..., 0], image(0, 0, 4)):
        with pytest.raises(ValueError, match="expected uint8"):
            fit_image(bad, 96)


def test_no_rows():
    with pytest.raises(ValueError, match="at least one row"):
        sheet.draw_contact_sheet([])
