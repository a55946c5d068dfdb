"""Stand-in photos for real and made annotation files: the benchmarks' own are not public domain.

`fashioniq`, `cirr` and `circo` take the published annotation files and give a raw directory with
a photo of each image; `small_fashioniq` and the like make the annotation files too, a few queries
each. `python -m dqe_jax.prepare --raw_dir=DIR` takes such a directory.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from dqe_jax.utils.files import write_json


def write_photo(path: Path, key: str | None = None, size: tuple[int, int] = (5, 7)) -> None:
    """Writes a picture of random colours that depend on its key alone; by default on its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256((key or path.stem).encode()).digest()
    width, height = size
    pixels = (digest * (width * height * 3 // len(digest) + 1))[: width * height * 3]
    image = Image.frombytes("RGB", size, pixels)
    if path.suffix == ".jpg":
        image.save(path, quality=95)
    else:
        image.save(path)


def fashioniq(
    source: Path,
    raw: Path,
    layout: str = "images/{id}.png",
    splits: Sequence[str] = ("train", "val", "test"),
) -> None:
    """The annotation files of `source`, with a photo of each image of the lists of `splits`."""
    for folder in ("captions", "image_splits"):
        shutil.copytree(source / folder, raw / folder)
    for file in sorted((raw / "image_splits").iterdir()):
        category, split = file.name.split(".")[1:3]
        for image in json.loads(file.read_text()) if split in splits else ():
            path = raw / layout.format(id=image, category=category)
            if not path.exists():
                write_photo(path)


def cirr(source: Path, raw: Path, splits: Sequence[str] = ("val", "test1")) -> None:
    """CIRR's files, with the photos of these splits at their published paths."""
    shutil.copytree(source, raw, dirs_exist_ok=True)
    for split in splits:
        listed = json.loads((raw / "image_splits" / f"split.rc2.{split}.json").read_text())
        for path in listed.values():
            write_photo(raw / "img_raw" / path)


def circo(source: Path, raw: Path, distractors: int = 100) -> int:
    """CIRCO's files, a list of the images they name and of some others, and their photos.

    Returns:
      How many images there are.
    """
    (raw / "annotations").mkdir(parents=True)
    named = set(range(1, distractors + 1))
    for split in ("val", "test"):
        shutil.copy(source / f"{split}.json", raw / "annotations")
        for query in json.loads((source / f"{split}.json").read_text()):
            named |= {query["reference_img_id"], *query.get("gt_img_ids", ())}
    _list_coco(raw, sorted(named))
    for image in named:
        write_photo(raw / "COCO2017_unlabeled" / "unlabeled2017" / _coco_file(image))
    return len(named)


def _coco_file(image: int) -> str:
    return f"{image:012d}.jpg"


def _list_coco(raw: Path, images: Sequence[int]) -> None:
    """COCO's list of these images."""
    listed = [{"id": image, "file_name": _coco_file(image)} for image in images]
    write_json(raw / "annotations" / "image_info_unlabeled2017.json", {"images": listed})


def small_fashioniq(
    raw: Path,
    count: int = 12,
    images: int = 40,
    categories: Sequence[str] = ("dress", "shirt", "toptee"),
) -> None:
    """A made FashionIQ: `count` queries and `images` images a category and split."""
    for category in categories:
        for split in ("train", "val", "test"):
            ids = [f"{category[0].upper()}{split.upper()}{i:04d}" for i in range(images)]
            records = [
                {"candidate": ids[i], "captions": [f"is more {i}", "is red"]}
                | ({} if split == "test" else {"target": ids[(i * 7 + 1) % images]})
                for i in range(count)
            ]
            write_json(raw / "captions" / f"cap.{category}.{split}.json", records)
            write_json(raw / "image_splits" / f"split.{category}.{split}.json", ids)
            for image in ids:
                write_photo(raw / "images" / f"{image}.jpg", size=(20, 30))


def small_cirr(raw: Path, count: int = 8, images: int = 60) -> None:
    """A made CIRR of `count` queries and `images` images a split; test1 without labels."""
    for split, folder in (("train", "train/7"), ("val", "dev"), ("test1", "test1")):
        names = [f"{split}-{i}-{i % 4}-img{i % 2}" for i in range(images)]
        paths = {name: f"./{folder}/{name}.png" for name in names}
        records = []
        for i in range(count):
            members = [names[(i * 5 + j * 3) % images] for j in range(6)]
            record = {"pairid": 100 + i, "reference": members[0], "caption": f"make it {i} red"}
            record["img_set"] = {"id": i, "members": members, "reference_rank": 0}
            if split != "test1":
                record |= {"target_hard": members[1], "target_soft": {members[1]: 1.0}}
            records.append(record)
        write_json(raw / "captions" / f"cap.rc2.{split}.json", records)
        write_json(raw / "image_splits" / f"split.rc2.{split}.json", paths)
        for path in paths.values():
            write_photo(raw / "img_raw" / path, size=(20, 14))


def small_circo(raw: Path, images: int = 70) -> None:
    """A made CIRCO of 5 labelled queries and 4 others."""
    ids = [1000 + 7 * i for i in range(images)]
    aspects = ("addition", "negation")
    for split, count in (("val", 5), ("test", 4)):
        records = []
        for i in range(count):
            record = {"reference_img_id": ids[i], "relative_caption": f"has {i} more"}
            record |= {"shared_concept": "a dog", "id": i}
            if split == "val":
                truth = [ids[i + 10], ids[i + 30]]
                record |= {"target_img_id": truth[0], "gt_img_ids": truth}
                record["semantic_aspects"] = list(aspects[: 1 + i % 2])
            records.append(record)
        write_json(raw / "annotations" / f"{split}.json", records)
    _list_coco(raw, ids)
    for image in ids:
        write_photo(raw / "unlabeled2017" / _coco_file(image), size=(18, 18))


def small_genecis(raw: Path, count: int = 3) -> None:
    """A made GeneCIS: `count` queries a task, of regions and of whole photos."""
    for task, kind in itertools.product(("focus", "change"), ("attribute", "object")):
        others = 9 if (task, kind) == ("focus", "attribute") else 14
        records = []
        for i in range(count):
            first = 100 * (i + 1) + (1000 if task == "focus" else 2000)
            images: list[dict[str, object]]
            if kind == "object":
                images = [{"val_image_id": first + 5000 + j} for j in range(others + 2)]
            else:
                box = [3 + i, 2, 9.5, 8]
                images = [
                    {"image_id": str(first + j), "instance_bbox": box} for j in range(others + 2)
                ]
            record = {"condition": f"colour {i}", "reference": images[0], "target": images[1]}
            records.append({**record, "gallery": images[2:]})
            for image in images:
                name = image.get("image_id") or f"{image['val_image_id']:012d}"
                write_photo(raw / "photos" / f"{name}.jpg", size=(24, 20))
        write_json(raw / "genecis" / f"{task}_{kind}.json", records)


def small_pinpoint(raw: Path, count: int = 6, images: int = 30) -> None:
    """A made PinPoint of `count` queries, every second one with two images."""
    import pyarrow as pa
    import pyarrow.parquet

    names = [f"{i:032x}" for i in range(images)]
    rows = [
        {
            "query_id": f"query_{i:05d}",
            "query_image_signature": names[i % 4],
            "query_image_signature2": names[5 if i > 1 else 4] if i % 2 else "None",
            "instruction": f"the same with {i} more",
            "positive_candidates": [names[6 + i], names[7 + i], names[6 + i]],
            "negative_candidates": [names[10 + i], names[11 + i], None],
            "query_category": ("Swap", "Negation")[i % 2],
        }
        for i in range(count)
    ]
    raw.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), raw / "pinpoint_licensed.parquet")
    (raw / "index_signatures.txt").write_text("\n".join(names) + "\n")
    for name in names:
        write_photo(raw / "images" / f"{name}.jpg", size=(18, 24))


def small_imagenet_r(raw: Path, classes: int = 3) -> None:
    """A made ImageNet-R with the lists of both protocols: two photos of each class and domain."""
    domains = {0: "cartoon", 1: "origami", 2: "toy", 3: "sculpture", 6: "photo"}
    photos, listed = [], []
    for kind, (code, domain), number in itertools.product(range(classes), domains.items(), (1, 2)):
        if (kind, domain) == (0, "origami"):
            continue  # queries for it have no relevant image
        folder = "real" if domain == "photo" else "imagenet-r"
        path = f"{folder}/n{kind}/{domain}_{kind}{number}.jpg"
        listed.append(f"imgnet/{path} {1000 * code + kind} ")
        if domain == "photo":
            photos.append(f"imgnet/{path} {kind} ")
        write_photo(raw / "imagenet_r" / path, key=path, size=(20, 20))
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "imgnet_targets.txt").write_text("\n".join(listed))
    (raw / "imgnet_real_query.txt").write_text("\n".join(photos))


def small_icir(raw: Path) -> None:
    """A made i-CIR of two instances."""
    queries, database = [], []
    for instance, size in (("lamp", 12), ("mug", 20)):
        for i in range(size):
            text = ("in a crowd", "at night", "", "")[i % 4] or f"alone {i}"
            database.append(f"database/{instance}/{i:03d}.jpg,{text},{instance}")
        queries += [
            f"query/{instance}/q.jpg,{text},{instance}" for text in ("in a crowd", "at night")
        ]
    for line in (*queries, *database):
        path = line.split(",")[0]
        write_photo(raw / "icir" / path, key=path, size=(20, 20))
    (raw / "icir" / "query_files.csv").write_text("\n".join(queries) + "\n")
    (raw / "icir" / "database_files.csv").write_text("\n".join(database) + "\n")


def small_shoes(raw: Path, images: int = 30, count: int = 12) -> None:
    """A made Shoes: `count` captions of eval over `images` photos, and one caption of train."""
    names = [f"img_womens_boots_{i}.jpg" for i in range(images)]
    train = [f"img_womens_clogs_{i}.jpg" for i in range(4)]
    pairs = [(names[i], names[(2 * i + 1) % images]) for i in range(count)]
    records = [
        {"ImageName": target, "ReferenceImageName": reference, "RelativeCaption": f"is darker {i}"}
        for i, (reference, target) in enumerate([(train[0], train[1]), *pairs])
    ]
    write_json(raw / "relative_captions_shoes.json", records)
    for split, listed in (("eval", names), ("train", train)):
        (raw / f"{split}_im_names.txt").write_text("\n".join(listed) + "\n")
        for i, name in enumerate(listed):
            write_photo(raw / "womens_boots" / str(i % 2) / name)


def small_lasco(raw: Path, ids: Sequence[int] = tuple(range(42, 82)), count: int = 24) -> None:
    """A made LaSCo of val: `count` queries over images with COCO's `ids`."""
    paths = [f"val2014/COCO_val2014_{image:012d}.jpg" for image in ids]
    corpus = [{"id": image, "path": f"val/{path}"} for image, path in zip(ids, paths)]
    records = [
        {
            "qid": 1000 * ids[i] + i,
            "query-text": f"the person is red {i}",
            "query-image": [ids[i], paths[i]],
            "target-image": [ids[(3 * i + 1) % len(ids)], paths[(3 * i + 1) % len(ids)]],
        }
        for i in range(count)
    ]
    write_json(raw / "lasco_val_corpus.json", corpus)
    write_json(raw / "lasco_val.json", records)
    for path in paths:
        write_photo(raw / path)


def small_fashion200k(raw: Path, images: int = 8, count: int = 15) -> None:
    """A made Fashion200k: `images` of each category, two with each description."""
    listed = []
    for category in ("dress", "jacket", "pants", "skirt", "top"):
        lines = []
        for i in range(images):
            path = f"women/{category}/casual/{i // 2}/{i // 2}_{i % 2}.jpeg"
            lines.append(
                f"{path}\t{i - 3.5}\t{('red', 'blue', 'a-line')[i // 2 % 3]} {i // 2} {category}"
            )
            listed.append(path)
            write_photo(raw / path, key=path)
        file = raw / "labels" / f"{category}_test_detect_all.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(lines) + "\n")
    pairs = [(listed[i], listed[(i * 7 + 2) % len(listed)]) for i in range(count)]
    (raw / "test_queries.txt").write_text("\n".join(map(" ".join, pairs)) + "\n")


def small_domains(
    raw: Path, name: str, domains: Sequence[str], files: Sequence[str], classes: int = 3
) -> None:
    """A made set of FREEDOM's protocol: two images of each class and domain for each list."""
    for file in files:
        lines = []
        for kind, domain, number in itertools.product(range(classes), domains, (1, 2)):
            path = f"{name}/{domain}/class_{kind}/{file[:4]}_{number}.jpg"
            lines.append(f"{path} {domain} class_{kind}")
            write_photo(raw / path, key=path, size=(20, 20))
        (raw / name / file).write_text("\n".join(lines))


def small_edir(raw: Path, images: int = 24, count: int = 10) -> None:
    """A made EDIR: `count` queries, every second one with a reference outside the corpus."""
    corpus = [f"510_{i:09d}_2.png" for i in range(images)]
    asked = [corpus[i] if i % 2 else f"511_{i:09d}_1.png" for i in range(count)]
    rows: dict[str, list[dict[str, object]]] = {
        "corpus": [{"id": image, "image": image} for image in corpus],
        "queries": [
            {
                "id": f"q{i}",
                "image": image,
                "text": f"make it {('red', 'blue')[i % 2]}",
                "metadata": {"subcategory": ("color", "count")[i % 2]},
            }
            for i, image in enumerate(asked)
        ],
        "instances": [
            {"qid": f"q{i}", "pos": [corpus[i + 3]], "neg": corpus[i + 4 : i + 7]}
            for i in range(count)
        ],
    }
    raw.mkdir(parents=True, exist_ok=True)
    for name, lines in rows.items():
        (raw / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    for image in dict.fromkeys([*corpus, *asked]):
        write_photo(raw / "imgs_mc" / image, size=(20, 20))


def small_circled(raw: Path, images: int = 14) -> None:
    """A made CIRCLED of three subsets, two sessions of two and three turns each."""
    names = {
        "fashioniq_dress_val": [f"B{i:09d}" for i in range(images)],
        "cirr_val": [f"dev-{i}-0-img0" for i in range(images)],
        "circo_val": [str(i) for i in range(200, 200 + images)],
    }
    write_json(raw / "split.dress.val.json", names["fashioniq_dress_val"])
    write_json(
        raw / "split.rc2.val.json", {name: f"./dev/{name}.png" for name in names["cirr_val"]}
    )
    _list_coco(raw, [int(name) for name in names["circo_val"]])
    for subset, listed in names.items():
        sessions = [
            {
                "session_id": f"{subset}_{number:04d}",
                "subset": subset,
                "ground_truth_ids": listed[number + 8 : number + 9 + (subset == "circo_val")],
                "num_turns": number + 2,
                "turns": [
                    {
                        "turn": turn + 1,
                        "reference_image_id": listed[2 * turn + number],
                        "relative_caption": f"is {('red', 'blue', 'darker')[turn]} now",
                    }
                    for turn in range(number + 2)
                ],
            }
            for number in range(2)
        ]
        write_json(raw / "data" / f"{subset}.json", sessions)
        for name in listed:
            file = _coco_file(int(name)) if subset == "circo_val" else f"{name}.png"
            write_photo(raw / "photos" / subset / file, size=(20, 20))


def small_triplets(raw: Path, images: int = 24, count: int = 30) -> None:
    """A catalogue in two folders with a triplets.csv: several targets, attributes, splits."""
    names = [f"{'ab'[i % 2]}/{i:03d}.jpg" for i in range(images)]
    lines = ["reference,text,text_2,target,split,attributes,kind"]
    for i in range(count):
        split = ("train", "val", "test")[i % 3]
        several = "|".join(names[(i * 5 + j) % images] for j in (1, 2))
        lines.append(
            f'{names[i % images]},"red, not blue",more {i},{several},{split},color=red,tint'
        )
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "triplets.csv").write_text("\n".join(lines) + "\n")
    for name in names:
        write_photo(raw / "images" / name, key=name, size=(20, 20))


def small_products(images: Path, table: Path, count: int = 150) -> list[dict[str, str]]:
    """Photos `p000.jpg` and so on, and a table of their colour, category and season.

    The seasons of some are not stated. Returns the rows of the table.
    """
    rows = []
    for i in range(count):
        name = f"p{i:03d}"
        write_photo(images / f"{name}.jpg", key=name, size=(20, 20))
        digest = hashlib.sha256(name.encode()).digest()
        rows.append(
            {
                "image": name,
                "colour": ("Red", "Navy Blue", "Off White")[digest[0] % 3],
                "category": ("Tshirts", "Sandals")[digest[1] % 2],
                "season": ("Summer", "Fall", "")[digest[2] % 3],
            }
        )
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    table.write_text("\n".join(lines) + "\n")
    return rows
