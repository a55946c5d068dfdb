"""Metadata of images, whatever shape the table has."""

import pytest

from dqe_jax.search.tables import allowed_rows, columns_of, read_table
from dqe_jax.utils.errors import UserError

IDS = ["a/1.jpg", "a/2.jpg", "b/3.png"]


@pytest.mark.parametrize(
    "text",
    [
        "image,brand,price\na/1.jpg,Ä,1\n2.jpg,B,\n3,C,2.5\n",
        "\ufeffbrand;price;image\r\nÄ;1;a/1.jpg\r\nB;;./a/2.jpg\r\n\r\nC;2.5;x/y/3.png\r\n",
        'key\tbrand\tprice\n1\t"Ä"\t1\n2\tB\t\n3\tC\t2.5\n',
    ],
)
def test_a_table_in_any_shape(tmp_path, text):
    (tmp_path / "t.csv").write_bytes(text.encode())
    columns = columns_of(read_table(tmp_path / "t.csv"), IDS)
    assert columns == {"brand": ["Ä", "B", "C"], "price": [1.0, None, 2.5]}
    assert allowed_rows(columns, 3, {"price": (1, None)}).tolist() == [True, False, True]


def test_what_a_line_lacks_is_said(tmp_path, caplog):
    (tmp_path / "t.csv").write_text("id,brand\n1,A\n9,B\n")
    columns = columns_of(read_table(tmp_path / "t.csv"), IDS)
    assert columns == {"brand": ["A", None, None]}
    assert "2 images have no line: a/2.jpg, b/3.png" in caplog.text
    assert "1 lines are of no image: 9" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must name at least two columns"),
        ("image\na\n", "must name at least two columns"),
        ("image,x,x\n", "each once"),
        ("image,x\na,1\na,2\n", "line 3: there is another line of 'a'"),
        ("image,x\na,1,2\n", "line 2: it has 3 cells, and there are 2 columns"),
        ("image,x\nz,1\n", "no line is of any of the 3 images"),
    ],
)
def test_a_table_that_is_not_right(tmp_path, text, words):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        columns_of(read_table(tmp_path / "t.csv"), IDS)
    with pytest.raises(UserError, match="cannot be read"):
        read_table(tmp_path / "none.csv")
