"""Triplets that are made from any table of attributes."""

import csv
import dataclasses
import hashlib
import io
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dqe_jax.cli.config_files import load_config
from dqe_jax.config import RunConfig
from dqe_jax.data import datasets, examples, splits
from dqe_jax.data.builders.benchmarks import make_builder
from dqe_jax.data.lexicon import load_lexicon, mentions
from dqe_jax.data.made import tables, wording
from dqe_jax.data.made.from_table import told, triplets_from_table
from dqe_jax.data.made.grammar import NA, changes
from dqe_jax.data.made.settings import made_fields
from dqe_jax.data.records import read_records
from dqe_jax.testing.standins import small_products, write_photo
from dqe_jax.utils.errors import UserError

REAL = Path(__file__).resolve().parents[3] / "shared" / "fashion_products"
SIZE = 16
ATTRIBUTES = ("colour", "category", "season")
# Of what is made of `small_products`; if it changes, so do the queries of everybody's tables.
DIGEST = "c8f73f7d0f2e7b79"


def make(root, table=None, attributes=ATTRIBUTES, **options):
    return triplets_from_table(
        table or root / "table.csv",
        root / "photos",
        options.pop("output", root / "made"),
        attributes=attributes,
        image_size=SIZE,
        **options,
    )


def stored(output, *, images=False):
    """All records, by split; images only if they are asked for."""
    builder = make_builder("triplets", str(output), image_size=SIZE, preprocess="pad")
    return {
        split: [
            {k: v for k, v in plain(record).items() if images or k != "image"}
            for record in read_records(builder, split)
        ]
        for split in builder.info.splits
    }


def plain(value):
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return hashlib.sha256(value).hexdigest()
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return [plain(v) for v in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with `photos/`, `table.csv` and what is made of them; the rows; the facts."""
    root = tmp_path_factory.mktemp("table")
    rows = small_products(root / "photos", root / "table.csv")
    return root, rows, make(root)


def test_every_valid_target_is_known_and_the_splits_share_no_photo(made):
    root, rows, facts = made
    data = stored(root / "made")
    of = {f"{row['image']}.jpg": row for row in rows}
    seen, asked = {}, {}
    for split in examples.SPLITS:
        gallery = [item["id"] for item in data[examples.gallery_split(split)]]
        tuples = [tuple(of[id_][name] or NA for name in ATTRIBUTES) for id_ in gallery]
        for row, id_ in enumerate(gallery):
            assert id_ not in seen
            seen[id_] = split
            stated = data[examples.gallery_split(split)][row]["attributes"]
            assert stated == [f"{n}={v}" for n, v in zip(ATTRIBUTES, tuples[row]) if v != NA]
        for query in data[split]:
            old, new = tuples[query["reference"]], tuples[query["target"]]
            changed = changes(old, new)
            assert 1 <= len(changed) <= 2
            assert query["attributes"] == [f"{ATTRIBUTES[i]}={new[i]}" for i in changed]
            assert all(new[i] != NA for i in changed)  # nobody asks for what is not stated
            valid = [row for row, values in enumerate(tuples) if values == new]
            assert query["valid"] == valid
            assert query["kinds"] == [ATTRIBUTES[changed[0]] if len(changed) < 2 else "two changes"]
        asked[split] = {pair for query in data[split] for pair in query["attributes"]}
        counts = facts["splits"][split]
        assert counts["products"] == len(gallery)
        assert counts["queries"] == len(data[split]) > 0
    assert len(seen) == facts["products"] == 150
    assert asked["validation"] | asked["test"] <= asked["train"]
    content = json.dumps(data, sort_keys=True).encode()
    assert hashlib.sha256(content).hexdigest()[:16] == DIGEST


def test_links_to_nothing_are_photos_that_are_lost(made, tmp_path):
    root, _, facts = made
    shutil.copytree(root / "photos", tmp_path / "photos")
    for name, target in (("p000.jpg", "nothing"), ("p001.jpg", "p001.jpg")):
        (tmp_path / "photos" / name).unlink()
        (tmp_path / "photos" / name).symlink_to(target)
    found = make(tmp_path, root / "table.csv", max_lost=0.1)
    assert found["products"] == facts["products"] - 2


def test_what_is_written_can_be_read(made):
    root, _, facts = made
    assert json.loads((root / "made" / "made.json").read_text()) == facts
    assert facts["columns"]["season"]["unstated"] > 0
    assert "valid" in facts["truth"]
    table = told(facts)
    for word in ("colour", "of one row", "train", "All valid targets"):
        assert word in table
    lines = [json.loads(line) for line in (root / "made" / "triplets.jsonl").open()]
    data = stored(root / "made")
    assert len(lines) == sum(len(data[split]) for split in examples.SPLITS)
    query = data["train"][0]
    assert lines[0]["texts"] == query["texts"]
    assert lines[0]["valid_targets"] == len(query["valid"])
    words = load_lexicon(str(root / "made" / "lexicon.txt"))
    texts = [query["texts"][0] for query in data["train"]]
    found = mentions(texts, ATTRIBUTES, words)
    for query, line in zip(data["train"], found):
        names = [pair.split("=")[0] for pair in query["attributes"]]
        assert [name for name, x in zip(ATTRIBUTES, line) if x] == [
            name for name in ATTRIBUTES if name in names
        ], query["texts"]


def test_a_run_takes_its_attributes_from_the_directory(made):
    root, _, _ = made
    fields = made_fields(root / "made")
    assert fields["model.attributes.names"] == ATTRIBUTES
    config = load_config("triplets:tiny")
    config.update_from_flattened_dict(fields)
    config.data.data_dir = str(root / "made")
    config.data.image_size = SIZE
    data = RunConfig.of(config).data
    split = splits.open_split(data, datasets.open_dataset(data), "test")
    assert split.coverage.complete
    assert len(split.queries.relevant[0])
    with pytest.raises(UserError, match=r"not prepared .*16px-pad.*dqe-jax triplets.*=224"):
        datasets.open_dataset(dataclasses.replace(data, image_size=224))
    assert made_fields(root / "photos") == {}


# --- Other shapes of the same table ---------------------------------------------------------------


def rewritten(rows, path, columns, *, delimiter=";", quoting=csv.QUOTE_ALL, encoding="utf-8"):
    """A table of `columns`, each (its name in the file, its value of a row)."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator="\r\n")
    writer.writerow([name for name, _ in columns])
    for i, row in enumerate(rows):
        writer.writerow([value(row, i) for _, value in columns])
    path.write_bytes(text.getvalue().encode(encoding))
    return path


def test_the_same_table_in_another_shape_gives_the_same_queries(made, tmp_path):
    root, rows, _ = made
    shapes = {
        "semicolons": dict(encoding="utf-8-sig"),
        "tabs": dict(delimiter="\t", quoting=csv.QUOTE_MINIMAL, encoding="utf-16"),
        "latin": dict(delimiter=",", encoding="cp1252"),
    }
    missing = ("", "NA", " n/a ", "-")
    columns = [
        ("Saison ", lambda row, i: row["season"] or missing[i % 4]),
        ("Größe", lambda row, i: 'für 2; "3"'),
        ("Farb Ton", lambda row, i: f" {row['colour'].replace(' ', '  ')} "),
        ("Datei", lambda row, i: f"C:\\export\\photos\\{row['image']}.JPEG"),
        ("KATEGORIE", lambda row, i: row["category"] if i else row["category"].upper()),
    ]
    before = stored(root / "made", images=True)
    for name, shape in shapes.items():
        table = rewritten(rows, tmp_path / f"{name}.csv", columns, **shape)
        facts = make(
            root,
            table,
            ("farbton:colour", "Kategorie:category", "Saison:season"),
            image_column="datei",
            output=tmp_path / name,
        )
        assert stored(tmp_path / name, images=True) == before
        assert facts["columns"]["category"]["respelled"] == 1
        assert facts["lost_rows"] == 0
        lexicon = (tmp_path / name / "lexicon.txt").read_text()
        assert lexicon == (root / "made" / "lexicon.txt").read_text()


def test_values_in_another_script_are_asked_for_in_their_own_words(made, tmp_path):
    root, rows, _ = made
    # In the order of the values that they stand for.
    written = {"Navy Blue": "青", "Off White": "白い", "Red": "赤"}
    names = sorted(written.values())
    written = dict(zip(sorted(written), names))
    columns = [
        ("image", lambda row, i: row["image"]),
        *((name, lambda row, i, name=name: row[name]) for name in ATTRIBUTES[1:]),
        ("colour", lambda row, i: written[row["colour"]]),
    ]
    make(root, rewritten(rows, tmp_path / "t.csv", columns), output=tmp_path / "plain")
    data, before = stored(tmp_path / "plain"), stored(root / "made")
    for split in examples.SPLITS:
        for own, other in zip(data[split], before[split], strict=True):
            assert (own["target"], own["valid"]) == (other["target"], other["valid"])
    words = load_lexicon(str(tmp_path / "plain" / "lexicon.txt"))
    assert set(names) <= words["colour"]
    # Called as before, they give the same texts.
    calls = "\n".join(f'"{own}" = "{value.lower()}"' for value, own in written.items())
    calls = calls.replace("off white", "off-white")
    (tmp_path / "words.toml").write_text(f"[colour.words]\n{calls}\n", encoding="utf-8")
    make(root, tmp_path / "t.csv", output=tmp_path / "called", templates=tmp_path / "words.toml")
    called = stored(tmp_path / "called")
    for split in examples.SPLITS:
        for own, other in zip(called[split], before[split], strict=True):
            assert own["texts"] == other["texts"]


# --- Bad input ------------------------------------------------------------------------------------


def test_bad_rows_and_cells_are_counted_and_named(tmp_path, caplog):
    rows = small_products(tmp_path / "photos", tmp_path / "table.csv")
    lines = (tmp_path / "table.csv").read_text().splitlines()
    lines[1] = lines[1].rsplit(",", 1)[0]  # a cell too few
    lines[2] = '"' + lines[2]  # a quote that does not end
    lines[3] = "nowhere," + lines[3].split(",", 1)[1]
    lines[4] = "," + lines[4].split(",", 1)[1]
    lines[5] = lines[5].replace(rows[4]["category"], "x" * 61)
    lines[6] = lines[6].replace(rows[5]["category"], "Tee\u0007s")
    lines[8] = lines[7]  # the photo of the row before
    (tmp_path / "table.csv").write_text("\n".join(lines))
    (tmp_path / "photos" / "p009.jpg").write_bytes(b"<html>")
    write_photo(tmp_path / "photos" / "more" / "q.png")
    facts = make(tmp_path)
    lost = facts["lost"]
    assert len(lost) == facts["lost_rows"] == 5
    assert lost["line 2"] == lost["line 3"] == "is not sound"
    assert lost["line 4 (nowhere)"] == "is of no photo"
    assert lost["line 5"] == "names no photo"
    assert lost["p009.jpg"] == "is no JPEG, PNG or WebP"
    assert facts["repeated"] == ["line 9 (p006)"]
    assert "more/q.png" in facts["photos_without_row_paths"]
    column = facts["columns"]["category"]
    assert (column["too_long"], column["no_text"]) == (1, 1)
    assert facts["rows"] == facts["products"] + 5
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "5 rows are lost" in said
    with pytest.raises(UserError, match=r"5 of 149 rows are lost .*--max_lost"):
        make(tmp_path, max_lost=0.01, overwrite=True)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"attributes": ("color",)}, r"no column 'color', which --attributes names; .*'colour'\?"),
        ({"attributes": ()}, r"--attributes names no column"),
        ({"attributes": ("colour:a=b",)}, r"'a=b' cannot be the name"),
        ({"attributes": ("colour", "season:colour")}, r"names 'colour' twice"),
        ({"attributes": ("image",)}, r"leaves the split 'validation' empty .*fewer columns"),
        ({"image_column": "colour"}, r"no row names a photo \(for example line 2 \("),
        ({"image_column": "photo"}, r"no column 'photo', which --image_column names"),
        ({"table": "none.csv"}, r"none\.csv cannot be read"),
        ({"table": "empty.csv"}, r"first line must name the columns"),
        ({"templates": "bad.toml"}, r"bad\.toml is not TOML"),
        ({"templates": "other.toml"}, r"\[size\] is none of the attributes"),
        ({"templates": "field.toml"}, r"'in {x}' in new of \[colour\] must hold {new}"),
        ({"templates": "same.toml"}, r"'Navy Blue' and 'Red' of colour are both called 'dark'"),
        ({"lexicon": "lexicon.txt"}, r"none of the sections \[colour\], "),
    ],
)
def test_errors(made, tmp_path, options, sentence):
    root, _, _ = made
    files = {
        "empty.csv": "",
        "bad.toml": "[colour",
        "other.toml": "[size]\nnew = ['{new}']",
        "field.toml": "[colour]\nnew = ['in {x}']",
        "same.toml": "[colour.words]\nRed = 'dark'\n'Navy Blue' = 'dark'",
        "lexicon.txt": "[size]\nbig\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for name in ("table", "templates", "lexicon"):
        if name in options:
            options = {**options, name: tmp_path / options[name]}
    with pytest.raises(UserError, match=sentence) as error:
        make(root, output=tmp_path / "out", **options)
    assert str(error.value).endswith((".", "?"))


def test_nothing_that_changes(made, tmp_path):
    root, rows, _ = made
    same = [("image", lambda row, i: row["image"]), ("colour", lambda row, i: "red")]
    table = rewritten(rows, tmp_path / "t.csv", same)
    with pytest.raises(UserError, match=r"none of the attributes colour has two"):
        make(root, table, ("colour",), output=tmp_path / "out")


def test_what_is_made_is_neither_mixed_nor_made_twice(made, tmp_path, caplog):
    root, _, facts = made
    shutil.copytree(root / "made", tmp_path / "made")
    with caplog.at_level("INFO"):
        assert make(root, output=tmp_path / "made") == facts
    assert "is made already" in caplog.text
    two = ("colour", "category")
    with pytest.raises(UserError, match="of another table"):
        make(root, attributes=two, output=tmp_path / "made")
    changed = make(root, attributes=two, output=tmp_path / "made", overwrite=True)
    assert changed["attributes"] == ["colour", "category"]
    (tmp_path / "made" / "made.json").unlink()
    with pytest.raises(UserError, match="not made by this command"):
        make(root, output=tmp_path / "made")


# --- Texts ----------------------------------------------------------------------------------------


def test_templates_of_a_user(tmp_path):
    (tmp_path / "t.toml").write_text(
        'joints = ["{} + {}"]\n[fabric]\nnoun = "material"\nnew = ["of {new}"]\n'
        '[fabric.words]\nWL = "Wool"\n[shoe]\nnew = ["{noun}: {new[one]} or {new[many]}"]\n'
        'new_and_old = ["{new[one]} for {old}"]\n'
    )
    grammar = wording.make_grammar(
        {"fabric": ["WL", "Silk"], "shoe": ["Sandals", "Boot"]}, tmp_path / "t.toml"
    )
    rng = random.Random(0)
    said = {grammar.modification(("Silk", "Boot"), ("WL", "Boot"), rng) for _ in range(20)}
    assert said == {"of wool"}
    said = {grammar.modification(("WL", "Sandals"), ("WL", "Boot"), rng) for _ in range(50)}
    assert said == {"shoe: a boot or boots", "a boot for sandals"}
    assert " + " in grammar.modification(("WL", "Boot"), ("Silk", "Sandals"), rng)
    words = wording.make_lexicon(grammar, {"fabric": ["WL"], "shoe": ["Sandals"]})
    assert {"material", "wool"} <= set(words["fabric"])
    assert "sandal" in words["shoe"]


def test_names_and_values_of_any_table_become_texts():
    values = {"heelHeight": ["Low", "High"], "color": ["Multi", "Multicolour"], "gender": ["men"]}
    grammar = wording.make_grammar(values)
    rng = random.Random(0)
    old = ("Low", "Multi", "men")
    said = {grammar.modification(old, ("High", *old[1:]), rng) for _ in range(60)}
    assert "change the heel height from low to high" in said
    # Of two values that people call the same each keeps its own word.
    new = ("Low", "Multicolour", "men")
    said = {grammar.modification(old, new, rng) for _ in range(60)}
    assert "in multicolour instead of multi" in said


def test_names_of_photos_are_found_as_people_write_them():
    find = tables.Finder(["a/1.jpg", "a/2.png", "b/2.png", "3.x.webp"]).paths
    assert find("a/1.jpg") == find("1") == find("./a/1.jpg") == find("x\\y\\1.jpeg") == ["a/1.jpg"]
    assert find("https://shop.example/img/a/2.png") == ["a/2.png"]
    assert sorted(find("2")) == ["a/2.png", "b/2.png"]
    assert find("3.x.jpg") == find("3.x") == ["3.x.webp"]
    assert find("4") == find("/") == []


# --- As a command, and on the real photos ---------------------------------------------------------


def test_the_command(tmp_path):
    from dqe_jax.testing.commands import run_module

    small_products(tmp_path / "photos", tmp_path / "table.csv")
    arguments = ("--table=table.csv", "--images=photos", "--output=made", "--image_size=16")
    done = run_module("dqe_jax", "triplets", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "--attributes names no column" in done.stderr
    done = run_module(
        "dqe_jax", "triplets", *arguments, "--attributes=colour,category,season", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "valid targets, median" in done.stderr
    assert "Train on it with --config=triplets:tiny" in done.stderr
    assert "--config.data.image_size=16" in done.stderr


def test_reading_a_table_needs_no_jax():
    code = (
        "import sys; import dqe_jax.data.made.tables, dqe_jax.data.made.wording; "
        "assert not {'jax', 'tensorflow_datasets'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
