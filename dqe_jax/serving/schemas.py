"""What requests and answers look like. FastAPI checks requests by this, and documents it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

TEXT = 1_000  # characters of a text
IDS = 500  # ids of a list
NAME = 4_096  # characters of an id
MOST = 100  # images of an answer

Text = Annotated[str, Field(max_length=TEXT)]
Id = Annotated[str, Field(min_length=1, max_length=NAME)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Word = Annotated[str, Field(max_length=TEXT)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Reference(_Strict):
    """A reference image: an image of the index, or one that was given to `/uploads`."""

    id: Id | None = None
    upload: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None

    @model_validator(mode="after")
    def _one(self) -> Reference:
        if (self.id is None) == (self.upload is None):
            raise ValueError("give either id or upload")
        return self


class Range(_Strict):
    """Numbers from `least` to `most`; either may be left out."""

    least: Number | None = None
    most: Number | None = None


Condition = Word | Number | Annotated[list[Word | Number], Field(max_length=IDS)] | Range


class Turn(_Strict):
    """A query of the conversation that came before."""

    references: Annotated[list[Reference], Field(min_length=1, max_length=4)]
    text: Text = ""


class SearchRequest(Turn):
    """A search: reference images, and what should change."""

    k: Annotated[int, Field(ge=1, le=MOST)] = 24
    weights: Annotated[
        dict[str, Annotated[Number, Field(ge=0, le=1_000)]],
        Field(max_length=100, description="Factors by attribute; 1 changes nothing."),
    ] = {}
    exclude: Annotated[list[Id], Field(max_length=IDS)] = []
    filter: Annotated[
        dict[str, Condition], Field(max_length=50, description="Conditions by column.")
    ] = {}
    include_reference: bool = False
    rejected: Annotated[
        list[Id], Field(max_length=100, description="Ids that are not what is meant.")
    ] = []
    earlier: Annotated[
        list[Turn], Field(max_length=8, description="The turns before, the oldest first.")
    ] = []


class Found(BaseModel):
    """An image that was found."""

    id: str
    score: float
    probability: float | None
    metadata: dict[str, str | float | None]


class SearchAnswer(BaseModel):
    """What a search has found, best first."""

    results: list[Found]
    attribute_weights: dict[str, float]
    warnings: list[str]
    seconds: float


class UploadAnswer(BaseModel):
    """An image that was taken: name it as `{"upload": ...}` in searches."""

    upload: str
    width: int
    height: int


class FeedbackRequest(_Strict):
    """A pick ("this one"), a rejection ("not this one"), or the withdrawal of either."""

    kind: Literal["pick", "reject", "withdraw"]
    image: Id
    conversation: Annotated[str, Field(pattern=r"^[0-9a-zA-Z-]{1,64}$")]
    turn: Annotated[int, Field(ge=0, le=10_000)]
    references: Annotated[list[Reference], Field(min_length=1, max_length=4)]
    text: Text = ""
    shown: Annotated[list[Id], Field(max_length=MOST)] = []


class FeedbackAnswer(BaseModel):
    """The line was logged."""

    logged: bool


class Column(BaseModel):
    """A column of metadata that searches can filter on."""

    name: str
    kind: Literal["numbers", "texts"]
    values: list[str]
    least: float | None
    most: float | None


class About(BaseModel):
    """What is served."""

    version: str
    images: int
    attributes: list[str]
    largest_factor: float  # of the sliders
    columns: list[Column]
    left_out: int
    step: int
    demo: str
    logs: bool
    upload_bytes: int


class Listing(BaseModel):
    """Some images of the index."""

    images: list[str]
    total: int


class Health(BaseModel):
    """The server answers."""

    status: Literal["ok"]
    images: int


class Problem(BaseModel):
    """What is wrong with a request, in a sentence."""

    error: str
