"""The application: search, images, uploads and feedback over an index, and the page."""

from __future__ import annotations

import hmac
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import anyio.to_thread
import numpy as np
from absl import logging
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from dqe_jax import __version__
from dqe_jax.data import feedback
from dqe_jax.search.asks import Ask, Known, Turn
from dqe_jax.search.index import Index
from dqe_jax.search.tables import Condition, Filter
from dqe_jax.serving import counters as metrics
from dqe_jax.serving import schemas
from dqe_jax.serving.batcher import Batcher, BusyError, ClosedError
from dqe_jax.serving.guard import COOKIE, App, Guard
from dqe_jax.serving.references import Newest, Upload, key_of, read_upload
from dqe_jax.serving.settings import Access, Limits
from dqe_jax.utils.errors import UserError

STATIC = Path(__file__).parent / "static"
SIDE = 1_024  # pixels of the longer side of a photo that is shown
KEPT = 256  # references of the index in memory: their pixels, or what the model made of them
# Of the sliders, by the form of the attribute weights. Raising a gate beyond 1.5 found fewer of the
# requested values on validation (docs/results.md).
LARGEST = {"sum": 4.0, "gate": 1.5}
VALUES = 200  # values of a column that the page offers
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Problem}
    for status in (400, 401, 403, 404, 408, 413, 415, 422, 503, 504)
}
_ABOUT = """\
Composed image retrieval: a reference image and a text that says what should change find the images
that fit. All errors are `{"error": "one sentence"}`. Where the server asks for a token, send it as
`Authorization: Bearer TOKEN`.
"""


class Service:
    """What the routes of an application share.

    Attributes:
      index: that is searched.
      batcher: that searches it.
      uploads: images that users gave.
    """

    def __init__(
        self,
        index: Index,
        *,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        log: Path | None = None,
        demo: str = "",
    ):
        """Starts the batcher's thread.

        Args:
          index: to search.
          limits: of the server.
          log: file for picks and rejections; None keeps none.
          demo: what the page says of a model that was made for show; "" for none.
        """
        self.index, self.log, self.demo, self.limits = index, log, demo, limits
        self.counters = metrics.Counters()
        self.uploads: Newest[str, Upload] = Newest(limits.uploads)
        self._known: Newest[str, Known] = Newest(KEPT)
        self.batcher = Batcher(
            index.answer, most=limits.batch, waiting=limits.requests, counted=self.counters.batch
        )

    def warm_up(self) -> None:
        """Compiles what searches need, so that the first ones do not wait."""
        first, model = self.known(self.index.ids[0]), self.index.model
        side = model.preprocessing.size
        for size in {1, self.limits.batch}:
            # What users give is encoded, whatever the index keeps.
            model.encode_references(np.zeros((size, side, side, 3), np.uint8))
            for text in ("", "in red"):
                for k in (10, schemas.MOST):
                    self.index.answer([Ask((first,), text, k)] * size)

    def known(self, id: str) -> Known:
        """An image of the index as the model sees it; raises a `UserError`."""
        return self._known.get_or_make(id, self.index.known)

    def reference(self, one: schemas.Reference) -> Known:
        """The reference image that a request names.

        Raises:
          HTTPException: there is none.
        """
        if one.upload is not None:
            upload = self.uploads.get(one.upload)
            if upload is None:
                raise HTTPException(404, "The image that you gave is gone: give it again.")
            return upload.known
        id_ = str(one.id)
        if not self.index.has(id_):
            raise HTTPException(404, f"There is no image {id_!r:.200} in the index.")
        return self.known(id_)

    def ask_of(self, request: schemas.SearchRequest) -> Ask:
        """The search that a request asks for; raises as `reference`, and as `Index.check`."""
        ask = Ask(
            images=tuple(map(self.reference, request.references)),
            text=request.text,
            k=request.k,
            weights=request.weights,
            exclude=tuple(request.exclude),
            filter=_filter_of(request.filter),
            include_reference=request.include_reference,
            rejected=tuple(request.rejected),
            earlier=tuple(
                Turn(tuple(map(self.reference, turn.references)), turn.text)
                for turn in request.earlier
            ),
        )
        self.index.check(ask)
        return ask

    def write(self, request: schemas.FeedbackRequest) -> bool:
        """Adds a line to the log; false if none is kept. Raises as `reference`."""
        if self.log is None:
            return False
        files, names = {}, []
        for one in request.references:
            self.reference(one)
            if one.upload is not None:
                files[one.upload] = cast(Upload, self.uploads.get(one.upload)).data
                names.append(feedback.UPLOAD + one.upload)
            else:
                names.append(str(one.id))
        click = feedback.Click(
            kind=request.kind,
            conversation=request.conversation,
            turn=request.turn,
            folder=str(self.index.root),
            references=tuple(names),
            text=request.text,
            image=request.image,
            shown=tuple(request.shown),
            model=self.index.model.fingerprint,
        )
        feedback.append(self.log, click, files)
        self.counters.feedback(request.kind)
        return True


def make_app(service: Service, *, access: Access = Access()) -> App:  # noqa: B008 (frozen)
    """The application over a service, behind its guard."""
    app = FastAPI(
        title="dqe_jax",
        version=__version__,
        description=_ABOUT,
        docs_url=None,  # these load their scripts from elsewhere; ours is /docs
        redoc_url=None,
        responses=_PROBLEMS,
    )
    _add_errors(app)
    _add_search(app, service)
    _add_images(app, service)
    _add_page(app, service, access)
    return Guard(app, access=access, limits=service.limits, counters=service.counters)


def _add_search(app: FastAPI, service: Service) -> None:
    index = service.index

    @app.post("/search", summary="Find images")
    async def search(request: schemas.SearchRequest) -> schemas.SearchAnswer:
        began = time.perf_counter()
        ask = await anyio.to_thread.run_sync(service.ask_of, request)
        found = await service.batcher.ask(ask)
        return schemas.SearchAnswer(
            results=[
                schemas.Found(
                    id=one.id,
                    score=one.score,
                    probability=one.probability,
                    metadata=dict(one.metadata),
                )
                for one in found
            ],
            attribute_weights=dict(found.attribute_weights),
            warnings=list(found.warnings),
            seconds=time.perf_counter() - began,
        )

    @app.post("/uploads", summary="Give a reference image: a JPEG, PNG or WebP as the body")
    async def upload(request: Request) -> schemas.UploadAnswer:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not re.fullmatch(r"image/[\w.+-]+|application/octet-stream", kind):
            raise HTTPException(415, "Send the image itself as the body, with its content type.")
        data = await request.body()
        how = index.model.preprocessing
        key = key_of(data)
        taken = service.uploads.get(key)
        if taken is None:
            taken = await anyio.to_thread.run_sync(read_upload, data, how)
            service.uploads.put(key, taken)
        return schemas.UploadAnswer(upload=key, width=taken.width, height=taken.height)

    @app.post("/feedback", summary="Say that an image is what was meant, or is not")
    async def give_feedback(request: schemas.FeedbackRequest) -> schemas.FeedbackAnswer:
        for id_ in (request.image, *request.shown):
            if not index.has(id_):
                raise HTTPException(404, f"There is no image {id_!r:.200} in the index.")
        try:
            logged = await anyio.to_thread.run_sync(service.write, request)
        except UserError as error:  # its sentence names the file
            logging.error("%s", error)
            raise HTTPException(507, "The log cannot be written: see the server's log.") from error
        return schemas.FeedbackAnswer(logged=logged)


def _add_images(app: FastAPI, service: Service) -> None:
    index = service.index
    cached = {"cache-control": "private, max-age=3600"}

    @app.get("/images", summary="Ids of images of the index")
    async def images(first: int = 0, count: int = 24) -> schemas.Listing:
        if first < 0 or not 1 <= count <= 1_000:
            raise HTTPException(422, "first must be at least 0, and count 1 to 1,000.")
        return schemas.Listing(images=list(index.ids[first : first + count]), total=len(index))

    @app.get("/images/{id:path}", summary="An image of the index, as a JPEG")
    async def image(id: str, size: str = "thumbnail") -> Response:
        if not index.has(id):
            raise HTTPException(404, "There is no such image in the index.")
        if size not in ("thumbnail", "large"):
            raise HTTPException(422, "size must be thumbnail or large.")
        data = await anyio.to_thread.run_sync(
            index.thumbnail if size == "thumbnail" else lambda one: index.photo(one, SIDE), id
        )
        if not data:
            raise HTTPException(404, "The thumbnail is gone: index the folder again.")
        return Response(data, media_type="image/jpeg", headers=cached)

    @app.get("/uploads/{key}", summary="A thumbnail of an image that was given")
    async def thumbnail(key: str) -> Response:
        found = service.uploads.get(key)
        if found is None:
            raise HTTPException(404, "The image that you gave is gone: give it again.")
        return Response(found.thumbnail, media_type="image/jpeg", headers=cached)


def _add_page(app: FastAPI, service: Service, access: Access) -> None:
    index = service.index
    about = schemas.About(
        version=__version__,
        images=len(index),
        attributes=list(index.model.attribute_names),
        largest_factor=LARGEST[index.model.config.model.attributes.form],
        columns=[_column_of(name, column) for name, column in index.columns.items()],
        left_out=len(index.problems),
        step=index.model.step,
        demo=service.demo,
        logs=service.log is not None,
        upload_bytes=service.limits.upload_bytes,
    )

    @app.get("/about", summary="What is served")
    async def what() -> schemas.About:
        return about

    @app.get("/health", summary="Whether the server answers")
    async def health() -> schemas.Health:
        return schemas.Health(status="ok", images=len(index))

    @app.get("/metrics", summary="Counters, in the format of Prometheus")
    async def counted() -> Response:
        text = service.counters.text(len(index), len(service.uploads))
        return Response(text, media_type=metrics.CONTENT_TYPE)

    @app.post("/session", summary="Exchange the token for a cookie, for the page", status_code=204)
    async def session(request: Request) -> Response:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if access.token and not (
            kind.lower() == "bearer" and hmac.compare_digest(given.encode(), access.token.encode())
        ):
            raise HTTPException(401, "This is not the token of the server.")
        answer = Response(status_code=204)
        if access.token:
            answer.set_cookie(
                COOKIE,
                access.token,
                httponly=True,
                samesite="strict",
                secure=request.headers.get("x-forwarded-proto", request.url.scheme) == "https",
            )
        return answer

    @app.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(STATIC / "docs.html", headers={"cache-control": "no-cache"})

    app.mount("/static", StaticFiles(directory=STATIC), name="static")


def _add_errors(app: FastAPI) -> None:
    """Every error is a sentence, without a path or a traceback."""

    def said(status: int, sentence: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
        return JSONResponse({"error": sentence}, status, headers=dict(headers or {}))

    @app.exception_handler(HTTPException)
    async def of_http(request: Request, error: HTTPException) -> JSONResponse:
        del request
        return said(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def of_request(request: Request, error: RequestValidationError) -> JSONResponse:
        del request
        return said(422, _sentence_of(error.errors()))

    @app.exception_handler(UserError)
    async def of_user(request: Request, error: UserError) -> JSONResponse:
        del request
        return said(422, str(error))

    @app.exception_handler(BusyError)
    async def of_crowd(request: Request, error: BusyError) -> JSONResponse:
        del request, error
        return said(503, "The server is busy: try again in a moment.", {"retry-after": "1"})

    @app.exception_handler(ClosedError)
    async def of_end(request: Request, error: ClosedError) -> JSONResponse:
        del request, error
        return said(503, "The server ends: try again when it is back.")


def _sentence_of(errors: Sequence[Any]) -> str:
    """What is wrong with a request, by the first thing that is."""
    if not errors:
        return "The request is not valid: see /docs."
    first = errors[0]
    place = ".".join(str(part) for part in first.get("loc", ())[1:])[:200]
    return f"{place or 'the request'}: {str(first.get('msg', 'is not valid'))[:200]}; see /docs."


def _filter_of(wanted: Mapping[str, schemas.Condition]) -> Filter | None:
    def of(condition: schemas.Condition) -> Condition:
        if isinstance(condition, schemas.Range):
            return (condition.least, condition.most)
        return condition

    return {name: of(one) for name, one in wanted.items()} or None


def _column_of(name: str, column: Sequence[str | float | None]) -> schemas.Column:
    numbers = [value for value in column if isinstance(value, float)]
    texts = sorted({value for value in column if isinstance(value, str)})
    return schemas.Column(
        name=name,
        kind="numbers" if numbers else "texts",
        values=texts[:VALUES],
        least=min(numbers, default=None),
        most=max(numbers, default=None),
    )
