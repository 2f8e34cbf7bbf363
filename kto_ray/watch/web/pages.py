"""The pages themselves, and the pictures on them.

Every page is whole without a script; `static/live.js` fetches it anew every few seconds and puts in the parts
(`data-part`) that changed. A page that is as the browser has it already costs an answer without a body. Reading may
take as long as a run's storage does, so it is done in threads.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, cast
from urllib.parse import quote

import jinja2
from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse

from kto_ray.config.run import NAME
from kto_ray.evaluate.albums import SIGNS, ImageStory, Key, spread
from kto_ray.evaluate.charts import duration, percent
from kto_ray.evaluate.hacking import with_opinions
from kto_ray.evaluate.plots import PLOTS, Plot, opinion_plots
from kto_ray.evaluate.report import HERE as REPORT
from kto_ray.evaluate.timeline import LATEST, timeline_of
from kto_ray.images import to_png
from kto_ray.people.web import pages as people_pages
from kto_ray.people.web.api import IMMUTABLE, PNG
from kto_ray.people.web.entrance import TheEntrance, bearer_header
from kto_ray.rounds import Round
from kto_ray.samples import Pixels
from kto_ray.watch import curves
from kto_ray.watch.curves import SvgChart, curves_of
from kto_ray.watch.finding import Found, Wish
from kto_ray.watch.reading import WatchedRun
from kto_ray.watch.standing import RunStanding, health_of, standing_of
from kto_ray.watch.thumbnails import Thumbnails

HERE = Path(__file__).parent
SHARED = ("base.css", "icon.svg")
"""Of people's page."""
STATIC = {name: people_pages.STATIC[name] for name in SHARED} | {
    file.name: (file.read_bytes(), people_pages.TYPES[file.suffix]) for file in sorted((HERE / "static").iterdir())
}
"""Read once: no request reaches the file system for them."""
ROUNDS, STRIP = 12, 16
"""Rounds on the overview, and pictures of each."""
MISSING = people_pages.MISSING

router = APIRouter()
templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader([HERE / "templates", people_pages.HERE / "templates", REPORT]),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
templates.globals |= {"SIGNS": SIGNS, "MISSING": MISSING, "box": (curves.WIDTH, curves.HEIGHT)}
templates.filters |= {
    "percent": percent,
    "duration": duration,
    "quoted": lambda text: quote(text, ""),
}


def named(runs: Sequence[WatchedRun]) -> dict[str, WatchedRun]:
    """Runs by what their addresses call them: their names, where these are fit for it and nobody else's."""
    names = [run.name for run in runs]
    fit = [bool(NAME.fullmatch(name)) and names.count(name) == 1 for name in names]
    return {run.name if ok else f"run-{place}": run for place, (run, ok) in enumerate(zip(runs, fit, strict=True))}


# -- who is calling, and what about


async def watcher(request: Request, entrance: TheEntrance, bearer: Annotated[Any, Depends(bearer_header)]) -> str:
    """The id of a badge that opens these pages. Raises Refused."""
    return entrance.caller(request, ("operator",), bearer.credentials if bearer else None, None).id


def the_runs(request: Request) -> Mapping[str, WatchedRun]:
    return cast(Mapping[str, WatchedRun], request.app.state.runs)


TheRuns = Annotated[Mapping[str, WatchedRun], Depends(the_runs)]


def the_run(name: str, runs: TheRuns) -> WatchedRun:
    if name not in runs:
        raise HTTPException(HTTPStatus.NOT_FOUND, "there is no such run here")
    return runs[name]


def the_key(album: str) -> Key:
    key = Key.parse(album)
    if key is None:
        raise HTTPException(HTTPStatus.NOT_FOUND, "there is nothing of this name")
    return key


TheRun = Annotated[WatchedRun, Depends(the_run)]
TheKey = Annotated[Key, Depends(the_key)]
inside = APIRouter(dependencies=[Depends(watcher)])


def page(request: Request, template: str, **values: Any) -> Response:
    """Render a template, unless the browser has it already; `to_root` leads to where all addresses begin."""
    root_path = request.scope.get("root_path", "")
    path = request.scope["path"].removeprefix(root_path)
    to_root = "../" * (path.count("/") - 1) or "./"
    runs = [(name, run.name) for name, run in the_runs(request).items()]
    here = request.path_params.get("name")
    shown = values | {"to_root": to_root, "runs": runs, "here": here, "run": dict(runs).get(here or "", "")}
    html = templates.get_template(template).render(shown).encode()
    tag = f'"{hashlib.sha256(html).hexdigest()[:32]}"'
    if request.headers.get("If-None-Match") == tag:
        return Response(status_code=HTTPStatus.NOT_MODIFIED, headers={"ETag": tag})
    return HTMLResponse(html, headers={"ETag": tag})


# -- pages


@router.get("/enter/{token}")
async def enter(request: Request, token: str, entrance: TheEntrance) -> Response:
    badge = entrance.admit(request, token)
    response = RedirectResponse("../", HTTPStatus.SEE_OTHER)
    entrance.let_in(request, response, "operator", token, badge)
    return response


@dataclass(frozen=True)
class Compared:
    """A run among several."""

    name: str
    run: WatchedRun
    standing: RunStanding
    color: str
    pass_rates: tuple[str, str]
    idle: str
    newest: Sequence[ImageStory]


@inside.get("/")
def all_runs(request: Request, runs: TheRuns) -> Response:
    """Several runs side by side; a single one's overview is all that there is."""
    if len(runs) == 1:
        return RedirectResponse(f"runs/{quote(next(iter(runs)), '')}/", HTTPStatus.SEE_OTHER)
    compared = [
        _compared(name, run, curves.RUNS[place % len(curves.RUNS)]) for place, (name, run) in enumerate(runs.items())
    ]
    return page(request, "runs.html.j2", compared=compared, curves=_side_by_side(compared))


def _compared(name: str, run: WatchedRun, color: str) -> Compared:
    now = run.now()
    line = timeline_of(run.config, now.rows["round"], now.rows["evaluation"])
    keys = now.keys["round"]
    images = run.album(keys[-1]).images if keys else ()
    return Compared(
        *(name, run, standing_of(run), color, _pass_rates(run), percent(line.idle) if line else MISSING),
        newest=spread(images, 2 * STRIP),
    )


def _side_by_side(compared: Sequence[Compared]) -> list[SvgChart]:
    """The same figure of all runs in one chart."""

    def series(one: Compared, kind: str, key: str) -> curves.Series:
        rows = one.run.now().rows[kind]
        if kind == "evaluation":
            return curves.held_out(rows, key, one.run.name, one.color)
        return curves.of_rows(rows, key, one.run.name, one.color)

    charts = (
        ("Share that passes", "Held-out prompts; the band is the 95 % interval.", "evaluation", "pass_rate", True),
        ("Share that passes, trained prompts", "The images of each round.", "round", "pass_rate", True),
        ("Mean score", "Held-out prompts, before the threshold.", "evaluation", "mean_score", False),
        ("Agreement", "Samples whose g - z has the sign of their verdict.", "round", "objective/accuracy", True),
        ("Diversity", "Mean distance between any two images of a round.", "round", "pictures/diversity", False),
        ("Seconds of a round", "From one trained round to the next.", "round", "seconds/round", False),
    )
    laid = [
        curves.laid_out(
            title, note, "policy" if kind == "evaluation" else "round", [series(o, kind, key) for o in compared], share
        )
        for title, note, kind, key, share in charts
    ]
    return [curve for curve in laid if curve]


def _pass_rates(run: WatchedRun) -> tuple[str, str]:
    """Of base and newest policy on held-out prompts."""
    rates = [row["pass_rate"] for row in run.now().rows["evaluation"] if row.get("pass_rate") is not None]
    return (percent(rates[0]), percent(rates[-1])) if rates else (MISSING, MISSING)


@inside.get("/runs/{name}/")
def overview(request: Request, run: TheRun) -> Response:
    now, config = run.now(), run.config
    scorers = {name: settings.held_out for name, settings in config.label.scorers.items()}
    rows = with_opinions(now.rows["round"], scorers)
    sections: list[tuple[str, str, tuple[Plot, ...]]] = [
        ("Is it getting better?", "Figures grow with the run.", PLOTS["progress"] + PLOTS["feedback"][:1]),
        ("Second opinions", "Scorers on one scale, and what the pictures look like.", opinion_plots(scorers)),
        ("The objective", "How training goes, round by round.", PLOTS["objective"]),
        ("People", "Who judged, and how well they agree.", PLOTS["people"]),
    ]
    shown = [(title, note, curves_of(plots, rows, now.rows["evaluation"])) for title, note, plots in sections]
    albums = [run.album(key) for key in reversed(now.keys["round"][-ROUNDS:])]
    return page(
        request,
        "overview.html.j2",
        standing=standing_of(run),
        model=config.model.name,
        pass_rates=_pass_rates(run),
        health=health_of(config, now.rows["round"]),
        sections=[section for section in shown if section[2]],
        albums=[(album, _counts(album.images), spread(album.images, STRIP)) for album in albums],
        evaluated=list(reversed(now.keys["evaluation"]))[:ROUNDS],
        more=max(0, len(now.keys["round"]) - ROUNDS),
    )


def _counts(images: Sequence[ImageStory]) -> dict[str, int]:
    labels = [image.label for image in images]
    return {label: labels.count(label) for label in SIGNS}


@inside.get("/runs/{name}/images")
def grid(request: Request, run: TheRun, wish: Annotated[Wish, Query()]) -> Response:
    """All images that the address asks for, page after page."""
    now = run.now()
    found = _found(run, wish)
    keys = [key for kind in ("round", "evaluation", "fresh_evaluation") for key in reversed(now.keys[kind])]
    return page(
        request,
        "grid.html.j2",
        wish=wish,
        found=found,
        scorers=list(run.config.label.scorers),
        voting=list(run.config.label.voting),
        people=run.config.label.people is not None,
        keys=keys,
        is_live=not wish.album or wish.album.startswith("round-"),
    )


def _found(run: WatchedRun, wish: Wish) -> Found:
    albums = [run.album(the_key(wish.album))] if wish.album else run.rounds()
    return run.finder.find(albums, wish, list(run.config.label.scorers))


@inside.get("/runs/{name}/images/{album}/{sample_id}")
def image(request: Request, run: TheRun, key: TheKey, sample_id: str, wish: Annotated[Wish, Query()]) -> Response:
    """The whole story of one image, among those that the grid showed."""
    shown = run.image(key, sample_id)
    found = _found(run, wish).images
    place = next((place for place, one in enumerate(found) if one.record.id == sample_id and one.key == key), None)
    around: tuple[ImageStory | None, ImageStory | None] = (None, None)
    if place is not None:
        around = (found[place - 1] if place else None, found[place + 1] if place + 1 < len(found) else None)
    album = run.album(key)
    ranks = {
        name: sum((one.value(name) or 0) > value for one in album.images if one.value(name) is not None) + 1
        for name in shown.scores
        if (value := shown.value(name)) is not None
    }
    return page(
        request,
        "image.html.j2",
        image=shown,
        album=album,
        ranks=ranks,
        around=around,
        place=place,
        count=len(found),
        wish=wish,
        policies=run.same_seed(shown),
        same_prompt=run.same_prompt(shown),
        held_out=run.config.label.held_out,
        scorers=list(run.config.label.scorers),
    )


@inside.get("/runs/{name}/timeline")
def timeline(request: Request, run: TheRun, all: bool = False) -> Response:
    now = run.now()
    line = timeline_of(run.config, now.rows["round"], now.rows["evaluation"], None if all else LATEST)
    return page(request, "timeline.html.j2", line=line, all=all)


# -- pictures


def _pixels(run: WatchedRun, image: ImageStory) -> Pixels:
    """Raises UserError where they were not kept."""
    try:
        pixels_BHWC = Round(run.storage / image.key.folder, image.key.stage).pixels_of([image.record])
    except FileNotFoundError as error:
        raise HTTPException(HTTPStatus.NOT_FOUND, "the pixels of this image are gone") from error
    pixels_HWC: Pixels = pixels_BHWC[0]
    return pixels_HWC


@inside.get("/runs/{name}/thumbnails/{album}/{sample_id}.webp")
def thumbnail(request: Request, run: TheRun, key: TheKey, sample_id: str) -> Response:
    shown, thumbnails = run.image(key, sample_id), cast(Thumbnails, request.app.state.thumbnails)
    return Response(thumbnails.of(shown, lambda: _pixels(run, shown)), media_type="image/webp", headers=IMMUTABLE)


@inside.get("/runs/{name}/pictures/{album}/{sample_id}.png")
def picture(run: TheRun, key: TheKey, sample_id: str) -> Response:
    """As it was drawn, to the bit."""
    (png,) = to_png(_pixels(run, run.image(key, sample_id))[None])
    return Response(png, media_type=PNG, headers=IMMUTABLE)


people_pages.add_static(router, STATIC)
router.include_router(inside)
