"""The JSON API; docs/labeling_api.md shows it in use. Our own page calls nothing else, so other front ends can do all
that it does."""

import io
import json
import time
from http import HTTPStatus
from typing import Annotated, Any, get_args

import pyarrow.parquet as pq
from fastapi import APIRouter, Depends, Path, Request, Response

from kto_ray.people.desk import Turn
from kto_ray.people.overview import Overview
from kto_ray.people.terms import Offer
from kto_ray.people.votes import Outcome, Vote
from kto_ray.people.web import wire
from kto_ray.people.web.entrance import AnyBadge, ApplicationsBadge, LabelersBadge, OperatorsBadge, TheDesk, same_site

PNG = "image/png"
IMMUTABLE = {"Cache-Control": "private, max-age=86400, immutable"}

Responses = dict[int | str, dict[str, Any]]


def refusals(**meanings: str) -> Responses:
    """For OpenAPI: statuses, written `_409="..."`, and what they mean here."""
    return {int(status[1:]): {"model": wire.Refusal, "description": text} for status, text in meanings.items()}


def file_of(media_type: str, description: str) -> Responses:
    return {200: {"content": {media_type: {}}, "description": description}}


router = APIRouter(
    prefix="/api",
    dependencies=[Depends(same_site)],
    responses=refusals(
        _401="No badge, or one that is unknown, expired or revoked.",
        _403="Excluded; or this is for the operator only, or for labelers only; or another site's page called.",
        _422="The request is not as it must be; the message names the field.",
        _429="Too many requests; the header Retry-After says for how many seconds to wait.",
    ),
)


def offered(offer: Offer) -> wire.OfferedImage:
    return wire.OfferedImage(
        item=offer.item,
        prompt=offer.prompt,
        image=f"api/images/{offer.item}.png",
        expires_in=round(max(0.0, offer.expires_at - time.time()), 1),
    )


def as_turn(turn: Turn) -> wire.TurnReply:
    progress = wire.ProgressReply.model_validate(turn.progress, from_attributes=True)
    return wire.TurnReply(progress=progress, offers=[offered(offer) for offer in turn.offers])


# -- for labelers


@router.post("/lease", tags=["labeling"])
async def lease(ask: wire.Ask, me: LabelersBadge, desk: TheDesk) -> wire.TurnReply:
    """Ask for images to judge. Those that were given before and wait for their answer come first."""
    return as_turn(await desk.turn(me, ask.count))


@router.post(
    "/answer",
    tags=["labeling"],
    responses=refusals(
        _404="There is no such image.",
        _409="lease: the image was not given to you; taken: it was, but for too long, and is somebody else's now; "
        "answered: you said something else before; sealed: its round is sealed.",
    ),
)
async def answer(said: wire.Said, me: LabelersBadge, desk: TheDesk) -> wire.TurnReply:
    """Answer, and get the next images. The same answer may be sent again: it counts once."""
    return as_turn(await desk.answer(me, said.item, said.verdict, said.seconds, said.count))


@router.post("/extend", tags=["labeling"])
async def extend(some: wire.SomeItems, me: LabelersBadge, desk: TheDesk) -> wire.Kept:
    """Keep images for another lease. Call it while somebody looks at them, every third of a lease or so."""
    return wire.Kept(items=await desk.extend(me, some.items))


@router.post("/release", tags=["labeling"], status_code=HTTPStatus.NO_CONTENT)
async def release(some: wire.SomeItems, me: LabelersBadge, desk: TheDesk) -> None:
    """Give images back unanswered, so that others need not wait until the lease ends."""
    await desk.release(me, some.items)


@router.post(
    "/undo",
    tags=["labeling"],
    responses=refusals(
        _404="There is no such image.",
        _409="undo: it is none of your latest answers, or the image is too old to be judged again; sealed: its round "
        "is sealed; taken: somebody else has the image now.",
    ),
)
async def undo(one: wire.OneItem, me: LabelersBadge, desk: TheDesk) -> wire.OfferedImage:
    """Take an answer back, and get the image again. Progress names the items that this works for."""
    return offered(await desk.undo(me, one.item))


@router.get("/progress", tags=["labeling"])
async def progress(me: LabelersBadge, desk: TheDesk) -> wire.ProgressReply:
    """Where the round stands. Asks for no images."""
    return as_turn(await desk.turn(me, 0)).progress


@router.get(
    "/images/{item}.png",
    tags=["labeling"],
    response_class=Response,
    responses=file_of(PNG, "The image.") | refusals(_404="There is no such image, or it was not given to you."),
)
async def image(item: Annotated[wire.Item, Path()], me: AnyBadge, desk: TheDesk) -> Response:
    """The picture itself, of an image that was given to this labeler; of any, for the operator."""
    return Response(await desk.image(me, item), media_type=PNG, headers=IMMUTABLE)


# -- for applications


@router.post("/votes", tags=["application"])
async def votes(some: wire.SomeVotes, me: ApplicationsBadge, desk: TheDesk) -> wire.VotesReply:
    """Send votes of the application's users. They may be sent again: each counts once."""
    now = time.time()
    outcomes = await desk.send(
        me, [Vote(f"api:{v.id}", v.image, v.verdict, v.who, now if v.when is None else v.when) for v in some.votes]
    )
    counts = {outcome: outcomes.counts[outcome] for outcome in get_args(Outcome)}
    return wire.VotesReply(**counts, examples={str(what): those for what, those in outcomes.examples.items()})


# -- for the operator


@router.get("/overview", tags=["operator"])
async def overview(me: OperatorsBadge, desk: TheDesk) -> Overview:
    """Everything on the operator's page: labelers, rounds, agreement, the latest images by verdict."""
    return await desk.overview(me)


@router.post(
    "/labelers/exclude",
    tags=["operator"],
    status_code=HTTPStatus.NO_CONTENT,
    responses=refusals(_404="There is nobody of this name."),
)
async def exclude(labeler: wire.LabelerName, me: OperatorsBadge, desk: TheDesk) -> None:
    """Ask somebody no more, and take their answers out of all rounds that are not sealed."""
    await desk.exclude(me, labeler.name)


@router.post(
    "/labelers/include",
    tags=["operator"],
    status_code=HTTPStatus.NO_CONTENT,
    responses=refusals(_404="There is nobody of this name."),
)
async def include(labeler: wire.LabelerName, me: OperatorsBadge, desk: TheDesk) -> None:
    """Ask somebody again who was excluded. The answers that were taken out stay out."""
    await desk.include(me, labeler.name)


@router.get(
    "/export.jsonl",
    tags=["operator"],
    response_class=Response,
    responses=file_of("application/x-ndjson", "A line an answer."),
)
async def export_jsonl(me: OperatorsBadge, desk: TheDesk) -> Response:
    """All answers that were ever given, in order, those that were taken back included."""
    rows = (await desk.export(me)).to_pylist()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return download(lines.encode(), "application/x-ndjson", "answers.jsonl")


@router.get(
    "/export.parquet",
    tags=["operator"],
    response_class=Response,
    responses=file_of("application/vnd.apache.parquet", "A row an answer."),
)
async def export_parquet(me: OperatorsBadge, desk: TheDesk) -> Response:
    """The same as `export.jsonl`, with types."""
    file = io.BytesIO()
    pq.write_table(await desk.export(me), file)
    return download(file.getvalue(), "application/vnd.apache.parquet", "answers.parquet")


def download(content: bytes, media_type: str, name: str) -> Response:
    return Response(content, media_type=media_type, headers={"Content-Disposition": f'attachment; filename="{name}"'})


@router.get("/openapi.json", tags=["about"], response_class=Response, responses=file_of("application/json", "OpenAPI."))
async def openapi(request: Request, me: AnyBadge, desk: TheDesk) -> Response:
    """This description."""
    await desk.role(me)
    here = {"servers": [{"url": request.scope.get("root_path") or "/"}]}
    return Response(json.dumps(request.app.openapi() | here), media_type="application/json")
