"""Text: the tokenizer, the lexicon, and how captions become one text."""

from __future__ import annotations

import io
import json
import random
import types

import numpy as np
import pytest

from dqe_jax.data import lexicon
from dqe_jax.data import tokenizer as text_tokens
from dqe_jax.data.text import encode_texts
from dqe_jax.data.transforms import join_captions
from dqe_jax.utils.errors import UserError

pytestmark = pytest.mark.core

TEXTS = [
    "make the red circle blue",
    "remove the small square",
    "Größer, bitte: ünïcode 日本語",
    "a v-neck t-shirt",
]


@pytest.fixture
def tokenizer():
    return text_tokens.train_word_tokenizer(TEXTS, 6)


def words(tokenizer, text):
    ids = text_tokens.encode(tokenizer, [text])[0][0]
    return [tokenizer.id_to_token(int(i)) for i in ids if i]


# -------------------------------------------------------------------------------------- tokenizer


def test_words_that_the_model_cannot_read_are_named(caplog):
    known = text_tokens.train_word_tokenizer(["make it red", "a small circle"], 8)
    texts = ("Cheap shoes, please!", "make it RED, cheap")
    assert text_tokens.unknown_words(known, texts) == ["cheap", "shoes", "please"]
    queries = types.SimpleNamespace(texts=texts)
    split = types.SimpleNamespace(name="validation", queries=queries)
    with caplog.at_level("WARNING"):
        encode_texts(known, split)
    assert "3 words of validation are in no training text" in caplog.text
    assert "ignores them: cheap, shoes, please." in caplog.text


def test_special_ids(tokenizer):
    assert tokenizer.token_to_id("[PAD]") == 0
    assert tokenizer.token_to_id("[UNK]") == 1
    ids = sorted(tokenizer.get_vocab().values())
    assert ids == list(range(tokenizer.get_vocab_size()))


def test_ids_are_padded_int32(tokenizer):
    ids, _ = text_tokens.encode(tokenizer, ["the circle", "make the red circle blue"])
    assert ids.dtype == np.int32
    assert ids.shape == (2, 6)
    assert (ids > 0).tolist() == [[True] * 2 + [False] * 4, [True] * 5 + [False]]
    assert ids[0, 0] == ids[1, 1]


def test_case_and_composition_do_not_matter(tokenizer):
    (one, other), _ = text_tokens.encode(tokenizer, ["RED gro\u0308ßer", "red größer"])
    np.testing.assert_array_equal(one, other)
    assert words(tokenizer, "RED größer") == ["red", "größer"]


def test_punctuation_is_split_off(tokenizer):
    assert words(tokenizer, "red,circle") == ["red", ",", "circle"]
    assert words(tokenizer, "t-shirt") == ["t", "-", "shirt"]


def test_unknown_words(tokenizer):
    assert words(tokenizer, "make it 🟥 blue") == ["make", "[UNK]", "[UNK]", "blue"]


@pytest.mark.parametrize("text", ["", "   ", "\n\t"])
def test_a_blank_text_is_one_unknown_word(tokenizer, text):
    ids, cut = text_tokens.encode(tokenizer, [text, "red"])
    assert ids[0].tolist() == [1, 0, 0, 0, 0, 0]
    assert not cut.any()


def test_non_ascii(tokenizer):
    assert words(tokenizer, "ünïcode") == ["ünïcode"]
    assert "[UNK]" not in words(tokenizer, "日本語")


def test_the_vocabulary_depends_on_the_words_alone():
    vocabulary = text_tokens.train_word_tokenizer(TEXTS, 6).get_vocab()
    for seed in range(5):
        shuffled = TEXTS * 3
        random.Random(seed).shuffle(shuffled)
        assert text_tokens.train_word_tokenizer(shuffled, 6).get_vocab() == vocabulary
    assert text_tokens.train_word_tokenizer(iter(TEXTS), 6).get_vocab() == vocabulary


def test_json_round_trip(tokenizer):
    again = text_tokens.tokenizer_from_json(tokenizer.to_str())
    texts = [*TEXTS, "", "new words", "make the red circle blue and large"]
    pairs = zip(text_tokens.encode(again, texts), text_tokens.encode(tokenizer, texts))
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)
    assert again.to_str() == tokenizer.to_str()


@pytest.mark.parametrize(("count", "cut"), [(1, False), (5, False), (6, False), (7, True)])
def test_long_texts_are_cut_and_reported(tokenizer, count, cut):
    text = " ".join(["red"] * count)
    ids, was_cut = text_tokens.encode(tokenizer, [text])
    assert ids.shape == (1, 6)
    assert (ids > 0).sum() == min(count, 6)
    assert was_cut.tolist() == [cut]


# ---------------------------------------------------------------------------------------- lexicon


def mentioned(text, names, lex):
    row = lexicon.mentions([text], names, lex)[0]
    return {name for name, value in zip(names, row) if value}


@pytest.fixture(scope="module")
def default():
    return lexicon.load_lexicon()


def test_the_default_lexicon_has_its_sections(default):
    assert set(default) == {
        *("color", "shape", "size", "position", "fill"),
        *("pattern", "article", "gender", "usage", "season"),
    }
    for name, entries in default.items():
        assert entries, name
        for entry in entries:
            assert entry == entry.strip().lower() != ""
            assert 1 <= len(entry.split()) <= 3, f"{name}: {entry!r} can never be found"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("make the large circle Blue", {"color", "size", "shape"}),
        ("move the square to the top left", {"shape", "position"}),
        ("the triangle is now striped", {"shape", "fill"}),
        ("", set()),
        ("remove it", set()),
        ("the redder one", set()),  # words, not parts of words
        ("blue, please!", {"color"}),
        ("größer", set()),
    ],
)
def test_mentions_of_shapes(default, text, expected):
    names = ("color", "shape", "size", "position", "fill")
    assert mentioned(text, names, default) == expected


def test_mentions_is_a_float_matrix_in_the_order_of_the_names(default):
    out = lexicon.mentions(["a red one", "a big circle"], ("size", "color", "shape"), default)
    assert out.dtype == np.float32
    assert out.tolist() == [[0, 1, 0], [1, 0, 1]]
    assert lexicon.mentions([], ("size",), default).shape == (0, 1)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *(
            ("make it a v-neck", "shape"),
            ("short sleeves", "shape"),
            ("with polka dots", "pattern"),
        ),
        *(("navy blue", "color"), ("Off-White", "color"), ("a T-shirt", "article")),
        ("knee length", "shape"),
    ],
)
def test_phrases_of_several_words(default, text, name):
    assert mentioned(text, (name,), default) == {name}


def test_a_phrase_needs_its_words_side_by_side(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("[color]\noff white, one two three\n")
    lex = lexicon.load_lexicon(str(path))
    assert mentioned("an off white shirt", ("color",), lex)
    assert mentioned("one two three", ("color",), lex)
    assert not mentioned("white, off it goes", ("color",), lex)
    assert not mentioned("white", ("color",), lex)


PLURALS = [
    *(("dress", "dresses"), ("box", "boxes"), ("shirt", "shirts"), ("shoe", "shoes")),
    *(("stripe", "stripes"), ("cross", "crosses"), ("size", "sizes"), ("sunglass", "sunglasses")),
    *(("watch", "watches"), ("clutch", "clutches"), ("blouse", "blouses"), ("rose", "roses")),
]


@pytest.mark.parametrize(("one", "many"), PLURALS)
def test_plurals_count_as_singulars(tmp_path, one, many):
    path = tmp_path / "words.txt"
    for entry in (one, many):
        path.write_text(f"[thing]\n{entry}\n")
        lex = lexicon.load_lexicon(str(path))
        for text in (one, many, many.upper()):
            assert mentioned(f"with {text}.", ("thing",), lex), (entry, text)


@pytest.mark.parametrize("word", ["dress", "glass", "gas", "is", "as"])
def test_not_every_s_is_a_plural(tmp_path, word):
    path = tmp_path / "words.txt"
    path.write_text(f"[thing]\n{word[:-1]}\n")
    assert not mentioned(word, ("thing",), lexicon.load_lexicon(str(path)))


def test_a_file_of_the_user(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(
        "# My words.\n\n[ material ]\nSilk, Cotton blend,, wool  # soft\n\n[fit]\nboxy\n"
        "[material]\nlinen\n[empty]\n"
    )
    assert lexicon.load_lexicon(str(path)) == {
        "material": {"silk", "cotton blend", "wool", "linen"},
        "fit": {"boxy"},
        "empty": set(),
    }


def test_errors_name_the_file_and_the_line(tmp_path):
    missing = tmp_path / "none.txt"
    with pytest.raises(UserError, match=r"config\.data\.lexicon: there is no file .*none\.txt"):
        lexicon.load_lexicon(str(missing))
    with pytest.raises(UserError, match="there is no file"):
        lexicon.load_lexicon(str(tmp_path))
    headless = tmp_path / "headless.txt"
    headless.write_text("# words\nred, blue\n[color]\n")
    with pytest.raises(UserError, match=r"headless\.txt, line 2: .*\[attribute\].*'red, blue'"):
        lexicon.load_lexicon(str(headless))


def test_an_attribute_without_a_section_is_named(default):
    with pytest.raises(UserError, match=r"attributes\.names: 'colour' has no section.*color"):
        lexicon.mentions(["red"], ("colour",), default)


# --------------------------------------------------------------------------------------- captions


@pytest.mark.parametrize(
    ("captions", "text"),
    [
        (["is red", "has sleeves"], "is red and has sleeves"),
        ([" is red ", "has sleeves\n"], "is red and has sleeves"),
        (["is red", "  "], "is red"),
        (["", "has sleeves"], "has sleeves"),
        (["only one"], "only one"),
        (["a", "b", "c"], "a and b and c"),
        (["", " "], ""),
        ([], ""),
    ],
)
def test_captions_are_joined(captions, text):
    assert join_captions(captions) == text


@pytest.mark.parametrize("content", [b"\xff\xfe[color]", bytes(range(256)), b"[color]\nred, \xe9"])
def test_a_lexicon_that_is_no_text(tmp_path, content):
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"words\.txt is not UTF-8 \(byte \d+\)"):
        lexicon.load_lexicon(str(path))


# ------------------------------------------------------------------------- tokenizers with code


def test_code_that_comes_with_a_tokenizer_never_runs(tmp_path, monkeypatch):
    """Whatever stands on stdin: nobody is asked."""
    mark = tmp_path / "it ran"
    (tmp_path / "mine.py").write_text(
        f"open({str(mark)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n\n\n"
        "class Mine(PreTrainedTokenizerFast):\n    pass\n"
    )
    config = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text('{"model_type": "mine"}')
    words = text_tokens.train_word_tokenizer(["a red one"], 6)
    (tmp_path / "tokenizer.json").write_text(words.to_str())
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(
        UserError, match=r"no tokenizer could be loaded from .*contains custom code"
    ):
        text_tokens.pretrained_tokenizer(tmp_path, 6)
    assert not mark.exists()
