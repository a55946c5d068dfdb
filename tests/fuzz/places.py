"""All places where a command reads a file."""

from __future__ import annotations

from tests.fuzz.annotation_places import ANNOTATIONS
from tests.fuzz.data_places import DATA
from tests.fuzz.model_places import MODELS
from tests.fuzz.place import Place

PLACES: tuple[Place, ...] = (*ANNOTATIONS, *DATA, *MODELS)
