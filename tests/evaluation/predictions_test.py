"""Files of predictions where the annotations themselves are damaged."""

import json

import pytest

from dqe_jax.evaluation.predictions import score
from dqe_jax.testing import standins
from dqe_jax.utils.errors import UserError


@pytest.mark.parametrize("damaged", [True, False])
def test_a_query_whose_record_is_left_out(tmp_path, damaged):
    """The sentence says that the annotations lack it; it is not the predictions' fault."""
    standins.small_cirr(tmp_path / "raw", count=2, images=12)
    file = tmp_path / "raw/captions/cap.rc2.val.json"
    records = json.loads(file.read_text())
    lists = {str(record["pairid"]): [record["target_hard"]] for record in records}
    if damaged:
        records[0]["pairid"] = True
    else:
        lists["7"] = []
    file.write_text(json.dumps(records))
    (tmp_path / "found.json").write_text(json.dumps(lists))
    words = "1 records that are not sound: get those again" if damaged else "; remove them"
    with pytest.raises(UserError, match=words):
        score("cirr", "val", tmp_path / "found.json", tmp_path / "raw")
