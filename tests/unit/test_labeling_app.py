"""The labeling app in this process, over a real desk: who gets in, what is refused and how, and what the API gives."""

import io
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pyarrow.parquet as pq
import pytest

from kto_ray.config.people import Gold, Human, Overlap
from kto_ray.errors import UserError
from kto_ray.people.access import Signer, secret_of
from kto_ray.people.desk import Desk
from kto_ray.people.people import Badge, Role
from kto_ray.people.terms import NewItem
from kto_ray.people.web.app import STATUS, create_app
from kto_ray.people.web.entrance import COOKIES, FAILURES_PER_MINUTE
from kto_ray.people.web.guard import HEADERS, MOST_BYTES
from kto_ray.people.web.pages import STATIC, ago

PREFIX = "/demo"
PNG = b"\x89PNG of "
BAD_PROMPT = "<script>alert(1)</script> \"quoted\" & 'more'"


class Site:
    """A desk, its app, and clients with or without a badge."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.settings = Human.model_validate(settings)
        self.desk = Desk(f"sqlite:///{folder}/people.sqlite", "test", self.settings, max_policy_lag=0)
        self.signer = Signer(secret_of(self.desk.engine))
        self.app = create_app(self.desk, self.settings, self.signer)
        self.clients: list[httpx2.AsyncClient] = []

    def token(self, name: str = "anna", role: Role = "labeler", days: float | None = None) -> str:
        return self.signer.token(self.desk.people.admit(name, role, days))

    def client(self, token: str | None = None, address: str = "192.0.2.1", prefix: str = PREFIX) -> httpx2.AsyncClient:
        """One that sends the token with every request."""
        transport = httpx2.ASGITransport(app=self.app, root_path=prefix, client=(address, 1))
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        base_url = f"http://labels.test{quote(prefix)}/"
        client = httpx2.AsyncClient(transport=transport, base_url=base_url, headers=headers)
        self.clients.append(client)
        return client

    async def browser(self, token: str) -> httpx2.AsyncClient:
        """One that came in by the link, and has its cookie."""
        client = self.client()
        assert (await client.get(f"enter/{token}")).status_code == 303
        return client

    def add(self, count: int, number: int = 0, prompt: str = "a red circle", needed: int = 1) -> None:
        """Images of a round, and no more."""
        stage = f"round-{number:05}"
        new = [
            NewItem(f"{stage}-{i}", f"p{i}", prompt, PNG + f"{number} {i}".encode(), number, needed)
            for i in range(count)
        ]
        self.desk.intake.add(stage, number, new)
        self.desk.intake.finish(stage, number)


MakeSite = Callable[..., Site]


@pytest.fixture
async def make_site(tmp_path: Path) -> AsyncIterator[MakeSite]:
    made: list[Site] = []

    def make(**settings: Any) -> Site:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        made.append(Site(folder, **settings))
        return made[-1]

    yield make
    for site in made:
        for client in site.clients:
            await client.aclose()
        site.desk.engine.dispose()


@pytest.fixture
def site(make_site: MakeSite) -> Site:
    return make_site()


async def lease(client: httpx2.AsyncClient, count: int = 1) -> list[dict[str, Any]]:
    reply = await client.post("api/lease", json={"count": count})
    assert reply.status_code == 200, reply.text
    offers: list[dict[str, Any]] = reply.json()["offers"]
    return offers


def form_token_of(page: httpx2.Response) -> str:
    found = re.search(r'name="form-token" content="([^"]+)"', page.text)
    assert found
    return found[1]


def assert_refused(reply: httpx2.Response, status: int, why: str) -> None:
    assert (reply.status_code, reply.json()["why"]) == (status, why), reply.text
    assert reply.json()["message"]


# -- who gets in


def broken_tokens(site: Site) -> dict[str, str]:
    revoked = site.token("ben")
    site.desk.people.revoke("ben")
    good = site.token()
    return {
        "forged": Signer("another secret").token(Badge("x", time.time() + 1000)),
        "altered": good[:-3] + ("aaa" if good[-3:] != "aaa" else "bbb"),
        "nonsense": "nonsense",
        "unknown": site.signer.token(Badge("nobody's", time.time() + 1000)),
        "expired": site.token(days=1e-9),
        "revoked": revoked,
        "form token": site.signer.form_token(Badge("x", 0)),
    }


@pytest.mark.parametrize("which", ["forged", "altered", "nonsense", "unknown", "expired", "revoked", "form token"])
async def test_a_link_that_does_not_work_shows_nothing(site: Site, which: str) -> None:
    site.add(1, prompt="secret prompt")
    token = broken_tokens(site)[which]
    in_header, in_cookie, none = site.client(token), site.client(), site.client()
    for role in ("labeler", "operator"):
        in_cookie.cookies.set(COOKIES[role], token)
    for path in ("", "overview", f"enter/{token}"):
        reply = await in_cookie.get(path)
        assert reply.status_code == 401, path
        assert "can send you one that works" in reply.text
        assert "secret prompt" not in reply.text
        assert "form-token" not in reply.text
        assert "anna" not in reply.text
        assert PREFIX.strip("/") not in reply.text
        assert "set-cookie" not in reply.headers
    calls = [("GET", f"api/{path}") for path in ("progress", "overview", "export.jsonl", "export.parquet")]
    calls += [("GET", "api/openapi.json"), ("GET", "api/images/0123456789abcdef.png"), ("POST", "api/lease")]
    for client in (in_header, in_cookie, none):
        for method, path in calls:
            reply = await client.request(method, path, json={} if method == "POST" else None)
            refused_as = {"unknown": "badge"}.get(which, which if which in ("expired", "revoked") else "badge")
            if client is in_cookie and method == "POST" and which in ("unknown", "revoked"):
                assert_refused(reply, 403, "form")  # no page of ours could have sent it
            else:
                assert_refused(reply, 401, "badge" if client is none else refused_as)


async def test_somebody_excluded_is_let_nowhere(site: Site) -> None:
    site.add(2)
    token = site.token()
    browser, client = await site.browser(token), site.client(token)
    await lease(client)
    site.desk.people.exclude("anna", "by the operator")
    for path in ("", f"enter/{token}"):
        reply = await browser.get(path)
        assert reply.status_code == 403
        assert "no longer asked for" in reply.text
        assert "form-token" not in reply.text
    assert_refused(await client.post("api/lease", json={}), 403, "excluded")
    assert_refused(await client.get("api/progress"), 403, "excluded")


async def test_roles_are_kept_apart(site: Site) -> None:
    site.add(1)
    labeler, operator = site.token(), site.token("operator", "operator")
    assert (await (await site.browser(labeler)).get("overview")).status_code == 403
    assert (await (await site.browser(operator)).get("")).status_code == 403
    as_labeler, as_operator = site.client(labeler), site.client(operator)
    for path in ("overview", "export.jsonl", "export.parquet"):
        assert_refused(await as_labeler.get(f"api/{path}"), 403, "operator")
    for act in ("exclude", "include"):
        assert_refused(await as_labeler.post(f"api/labelers/{act}", json={"name": "anna"}), 403, "operator")
    assert_refused(await as_operator.post("api/lease", json={}), 403, "operator")
    assert_refused(await as_operator.get("api/progress"), 403, "operator")


async def test_the_operator_may_label_in_the_same_browser(site: Site) -> None:
    site.add(1)
    browser = await site.browser(site.token())
    await browser.get(f"enter/{site.token('operator', 'operator')}")
    judge, overview = await browser.get(""), await browser.get("overview")
    assert (judge.status_code, overview.status_code) == (200, 200)
    (offer,) = (await browser.post("api/lease", json={}, headers={"X-Form-Token": form_token_of(judge)})).json()[
        "offers"
    ]
    assert (await browser.get(offer["image"])).status_code == 200
    assert (await browser.get(f"overview/{offer['item']}.png")).status_code == 200


@pytest.mark.parametrize(
    ("public_url", "path", "secure"),
    [(None, "/demo", False), ("https://labels.example.org", "/demo", True), ("https://a.org/x/", "/x/demo", True)],
)
async def test_the_cookie_is_for_this_run_only(
    make_site: MakeSite, public_url: str | None, path: str, secure: bool
) -> None:
    site = make_site(public_url=public_url)
    reply = await site.client().get(f"enter/{site.token(days=2)}")
    assert (reply.status_code, reply.headers["location"]) == (303, "../")
    parts = reply.headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=lax", f"Path={path}"} <= set(parts)
    assert ("Secure" in parts) == secure
    (max_age,) = (int(part.removeprefix("Max-Age=")) for part in parts if part.startswith("Max-Age="))
    assert 2 * 86400 - 60 < max_age <= 2 * 86400
    operators = await site.client().get(f"enter/{site.token('operator', 'operator')}")
    assert operators.headers["location"] == "../overview"


@pytest.mark.parametrize("name", ["my run", "Läufe", "x?y#z", "a%b", "a;b, c", "%20"])
async def test_a_run_may_lie_under_any_name(site: Site, name: str) -> None:
    """A browser sends a cookie where its path is that of the address as it is written, quoted."""
    browser = site.client(prefix=f"/{name}")
    reply = await browser.get(f"enter/{site.token()}")
    assert f"Path=/{quote(name)}" in reply.headers["set-cookie"].split("; ")
    assert (await browser.get("")).status_code == 200
    reply = await browser.get(f"http://labels.test/{quote(name)}")
    assert (reply.status_code, reply.headers["location"]) == (307, f"./{quote(name)}/")


async def test_the_run_is_found_without_the_slash_at_its_end(site: Site) -> None:
    reply = await site.client().get(f"http://labels.test{PREFIX}")
    assert (reply.status_code, reply.headers["location"]) == (307, "./demo/")


# -- what other sites' pages, and those who ask too much, cannot do


async def test_a_page_must_show_that_it_is_ours(site: Site) -> None:
    site.add(1)
    browser = await site.browser(site.token())
    token = form_token_of(await browser.get(""))
    foreign = form_token_of(await (await site.browser(site.token("ben"))).get(""))
    for wrong in ({}, {"X-Form-Token": ""}, {"X-Form-Token": "x"}, {"X-Form-Token": foreign}):
        for path in ("lease", "answer", "extend", "release", "undo"):
            assert_refused(await browser.post(f"api/{path}", json={}, headers=wrong), 403, "form")
    assert (await browser.post("api/lease", json={}, headers={"X-Form-Token": token})).status_code == 200


async def test_calls_from_other_sites_are_refused_and_links_from_there_are_not(site: Site) -> None:
    token = site.token()
    elsewhere = {"Sec-Fetch-Site": "cross-site"}
    assert_refused(await site.client(token).post("api/lease", json={}, headers=elsewhere), 403, "site")
    assert_refused(await site.client(token).get("api/progress", headers=elsewhere), 403, "site")
    browser = site.client()
    assert (await browser.get(f"enter/{token}", headers=elsewhere)).status_code == 303
    assert (await browser.get("", headers=elsewhere)).status_code == 200


async def test_requests_of_a_badge_are_limited(make_site: MakeSite) -> None:
    site = make_site(requests_per_minute=3)
    client, other = site.client(site.token()), site.client(site.token("ben"))
    statuses = [(await client.get("api/progress")).status_code for _ in range(4)]
    assert statuses == [200, 200, 200, 429]
    refused = await client.get("api/progress")
    assert_refused(refused, 429, "rate")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert (await other.get("api/progress")).status_code == 200


async def test_guessing_is_limited_by_address_and_locks_nobody_out(site: Site) -> None:
    guesser = site.client("nonsense")
    statuses = [(await guesser.get("api/progress")).status_code for _ in range(FAILURES_PER_MINUTE + 1)]
    assert statuses == [401] * FAILURES_PER_MINUTE + [429]
    assert (await site.client().get("enter/nonsense")).status_code == 429
    assert (await site.client(site.token()).get("api/progress")).status_code == 200  # from the same address
    assert (await site.client("nonsense", address="192.0.2.2").get("api/progress")).status_code == 401


async def test_a_proxy_on_this_machine_says_whom_it_calls_for(site: Site) -> None:
    proxy = site.client("nonsense", address="127.0.0.1")
    for number in range(FAILURES_PER_MINUTE + 5):
        forged_and_real = f"10.0.0.1, 198.51.100.{number}"
        assert (await proxy.get("api/progress", headers={"X-Forwarded-For": forged_and_real})).status_code == 401
    far = site.client("nonsense", address="192.0.2.9")
    statuses = {
        (await far.get("api/progress", headers={"X-Forwarded-For": f"10.0.0.{number}"})).status_code
        for number in range(FAILURES_PER_MINUTE + 1)
    }
    assert 429 in statuses


async def test_bodies_are_limited_with_and_without_a_stated_length(site: Site) -> None:
    client = site.client(site.token())

    async def pieces(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b" " * 1000

    headers = {"Content-Type": "application/json"}
    fits = b"{}" + b" " * (MOST_BYTES - 2)
    assert (await client.post("api/lease", content=fits, headers=headers)).status_code == 200
    assert_refused(await client.post("api/lease", content=fits + b" ", headers=headers), 413, "size")
    reply = await client.post("api/lease", content=pieces(17), headers=headers)
    assert "content-length" not in reply.request.headers
    assert_refused(reply, 413, "size")


async def test_every_response_tells_browsers_what_is_allowed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.add(1)
    token = site.token()
    client, browser = site.client(token), await site.browser(token)
    (offer,) = await lease(client)
    image = await client.get(offer["image"])
    replies = [
        *[await browser.get(path) for path in ("", "overview", "nowhere", "static/base.css", f"enter/{token}")],
        *[await client.get(f"api/{path}") for path in ("progress", "overview", "nowhere", "openapi.json")],
        await client.post("api/lease", content=b"x" * 20000),
        await client.post("api/lease", json={"count": "many"}),
        await client.delete("api/lease"),
        await site.client().get("api/progress"),
        await site.client().get(f"http://labels.test{PREFIX}"),
        image,
    ]

    async def fail(*_: object) -> None:
        raise RuntimeError("the database is gone")

    monkeypatch.setattr(site.desk, "turn", fail)
    broken = await client.get("api/progress")
    assert_refused(broken, 500, "fault")
    assert "database" not in broken.text
    statuses = [reply.status_code for reply in [*replies, broken]]
    assert set(statuses) == {200, 303, 307, 401, 403, 404, 405, 413, 422, 500}
    for reply in [*replies, broken]:
        for name, value in HEADERS.items():
            assert reply.headers[name] == value, (reply.url, name)
        cached = "private, max-age=86400, immutable" if reply is image else "no-store"
        assert reply.headers["Cache-Control"] == cached
    policy = HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert {"base-uri 'none'", "frame-ancestors 'none'", "form-action 'none'"} <= set(policy.split("; "))


async def test_faults_do_not_write_links_to_the_log(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_: object) -> None:
        raise RuntimeError("the database is gone")

    monkeypatch.setattr(site.desk, "role", fail)
    token = site.token()
    assert (await site.client().get(f"enter/{token}")).status_code == 500
    assert "the database is gone" in caplog.text
    assert token not in caplog.text


# -- what is on the pages


async def test_pages_hold_no_script_or_style_of_their_own(site: Site) -> None:
    site.add(1)
    labeler, operator = site.token(), site.token("operator", "operator")
    pages = [await (await site.browser(labeler)).get(""), await (await site.browser(operator)).get("overview")]
    pages.append(await site.client().get("nowhere"))
    for page in pages:
        assert not re.search(r"<script(?![^>]* src=)|<style| style=| on[a-z]+=", page.text)
        for address in re.findall(r'(?:src|href)="([^"]+)"', page.text):
            assert not re.match(r"[a-z]+:|/", address), address  # nothing from elsewhere, and all of it relative
            if address.startswith(("./static/", "../static/")):
                assert (await site.client().get(str(page.url.join(address)))).status_code == 200, address


async def test_the_labeler_is_shown_nothing_that_would_sway(site: Site) -> None:
    site.add(1, number=3)
    client = site.client(site.token())
    reply = await client.post("api/lease", json={})
    assert set(reply.json()["offers"][0]) == {"item", "prompt", "image", "expires_in"}
    assert "round-00003" not in reply.text
    assert "policy" not in reply.text


async def test_names_are_text_on_the_pages(site: Site) -> None:
    name = "<img src=x onerror=alert(1)>\"'"
    site.desk.people.admit(name)
    labelers_page = await (await site.browser(site.token(name))).get("")
    overview = await (await site.browser(site.token("operator", "operator"))).get("overview")
    for page in (labelers_page, overview):
        assert "<img src=x" not in page.text
        assert "&lt;img src=x" in page.text


async def test_prompts_travel_as_json_and_never_in_a_page(site: Site) -> None:
    site.add(1, prompt=BAD_PROMPT)
    token = site.token()
    (offer,) = await lease(site.client(token))
    assert offer["prompt"] == BAD_PROMPT
    assert "alert" not in (await (await site.browser(token)).get("")).text


def test_scripts_never_make_html_out_of_text() -> None:
    for name, (content, _) in STATIC.items():
        if name.endswith(".js"):
            assert not re.search(rb"(inner|outer)HTML\s*\+?=[^=]|insertAdjacent|document\.write|eval\(", content), name


@pytest.mark.parametrize(
    "name",
    [
        "../app.py",
        "..%2fapp.py",
        "%2e%2e/app.py",
        "%2e%2e%2fapp.py",
        "....//app.py",
        "/etc/passwd",
        "%00",
        "judge.html.j2",
    ],
)
async def test_requests_reach_no_files(site: Site, name: str) -> None:
    client = site.client(site.token())
    for path in (f"static/{name}", f"api/images/{name}.png", f"api/images/{name}", f"overview/{name}.png"):
        reply = await client.get(httpx2.URL(f"http://labels.test{PREFIX}/{path}"))
        assert reply.status_code in (401, 404), path
        assert b"import" not in reply.content


# -- the API


async def test_a_labeler_judges_a_round(site: Site) -> None:
    site.add(3, prompt="a blue ring")
    client = site.client(site.token())
    offers = await lease(client, 10)
    assert len(offers) == 3
    for number, offer in enumerate(offers):
        assert offer["prompt"] == "a blue ring"
        assert 0 < offer["expires_in"] <= site.settings.lease_s
        image = await client.get(offer["image"])
        assert image.headers["content-type"] == "image/png"
        assert image.content.startswith(PNG)
        said = {"item": offer["item"], "verdict": ["desirable", "undesirable", "unsure"][number], "seconds": 1.5}
        reply = await client.post("api/answer", json={**said, "count": 2})
        assert [left["item"] for left in reply.json()["offers"]] == [left["item"] for left in offers[number + 1 :]]
    progress = (await client.get("api/progress")).json()
    assert progress == {
        **{"round": 0, "asked": 3, "judged": 3, "target": 3, "waits_for": "people", "answers": 3},
        "undoable": [offer["item"] for offer in reversed(offers)],
    }


async def test_what_is_not_as_it_must_be_is_said_clearly(site: Site) -> None:
    site.add(1)
    client = site.client(site.token())
    (offer,) = await lease(client)
    wrong: dict[str, dict[str, Any]] = {
        "verdict: ": {"verdict": "good"},
        "seconds: ": {"verdict": "skip", "seconds": -1},
        "count: ": {"verdict": "skip", "count": 11},
        "score: ": {"verdict": "skip", "score": 1},
        "item: ": {"verdict": "skip", "item": "../../x"},
    }
    for field, said in wrong.items():
        reply = await client.post("api/answer", json={"item": offer["item"], **said})
        assert_refused(reply, 422, "request")
        assert reply.json()["message"].startswith(field), reply.text
    reply = await client.post("api/answer", json={"item": offer["item"], "verdict": "good"})
    for word in ("desirable", "undesirable", "unsure", "skip"):
        assert f"'{word}'" in reply.json()["message"]
    for content in (b"", b"{", b'{"count": NaN}', b"[]", b'"\\ud800"'):
        reply = await client.post("api/lease", content=content, headers={"Content-Type": "application/json"})
        assert reply.status_code == 422, content
    nan = b'{"item": "a", "verdict": "skip", "seconds": NaN}'
    reply = await client.post("api/answer", content=nan, headers={"Content-Type": "application/json"})
    assert_refused(reply, 422, "request")


async def test_answers_count_once(site: Site) -> None:
    site.add(1)
    client = site.client(site.token())
    (offer,) = await lease(client)
    said = {"item": offer["item"], "verdict": "desirable"}
    replies = [await client.post("api/answer", json=said) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 200]
    assert replies[-1].json()["progress"]["answers"] == 1
    assert_refused(await client.post("api/answer", json={**said, "verdict": "undesirable"}), 409, "answered")


async def test_answers_on_other_peoples_images_are_refused(site: Site) -> None:
    site.add(1)
    anna, ben = site.client(site.token()), site.client(site.token("ben"))
    (offer,) = await lease(anna)
    assert await lease(ben) == []
    said = {"item": offer["item"], "verdict": "desirable"}
    assert_refused(await ben.post("api/answer", json=said), 409, "lease")
    assert_refused(await ben.get(offer["image"]), 404, "item")
    assert_refused(await anna.post("api/answer", json={**said, "item": "0123456789abcdef"}), 404, "item")
    assert_refused(await anna.get("api/images/0123456789abcdef.png"), 404, "item")
    assert (await anna.get(offer["image"])).status_code == 200


async def test_late_answers_count_unless_somebody_else_has_the_image(site: Site) -> None:
    later = [0.0]
    site.desk.clock = site.desk.queue.clock = site.desk.people.clock = lambda: time.time() + later[0]
    site.add(2)
    anna, ben = site.client(site.token()), site.client(site.token("ben"))
    first, second = await lease(anna, 2)
    later[0] = site.settings.lease_s + 1
    said = {"verdict": "desirable", "count": 0}
    assert (await anna.post("api/answer", json={"item": first["item"], **said})).status_code == 200
    assert [offer["item"] for offer in await lease(ben)] == [second["item"]]
    assert_refused(await anna.post("api/answer", json={"item": second["item"], **said}), 409, "taken")


async def test_leases_are_extended_and_given_back(site: Site) -> None:
    site.add(2)
    anna, ben = site.client(site.token()), site.client(site.token("ben"))
    keep, give = (offer["item"] for offer in await lease(anna, 2))
    reply = await anna.post("api/extend", json={"items": [keep, give, "0123456789abcdef"]})
    assert sorted(reply.json()["items"]) == sorted([keep, give])
    reply = await anna.post("api/release", json={"items": [give]})
    assert (reply.status_code, reply.content) == (204, b"")
    assert [offer["item"] for offer in await lease(ben, 2)] == [give]
    assert_refused(await anna.post("api/extend", json={"items": ["x"] * 51}), 422, "request")


async def test_answers_are_taken_back_until_the_round_is_sealed(site: Site) -> None:
    site.add(2)
    client = site.client(site.token())
    first, second = await lease(client, 2)
    for offer in (first, second):
        await client.post("api/answer", json={"item": offer["item"], "verdict": "undesirable"})
    again = await client.post("api/undo", json={"item": first["item"]})
    assert again.json() | {"expires_in": 0} == first | {"expires_in": 0}
    reply = await client.post("api/answer", json={"item": first["item"], "verdict": "desirable"})
    assert reply.status_code == 200
    site.desk.intake.seal("round-00000")
    assert_refused(await client.post("api/undo", json={"item": first["item"]}), 409, "sealed")
    assert_refused(await client.post("api/undo", json={"item": "0123456789abcdef"}), 404, "item")
    assert (await client.get("api/progress")).json()["waits_for"] == "training"


async def test_an_image_that_nobody_answered_cannot_be_taken_back(site: Site) -> None:
    site.add(1)
    client = site.client(site.token())
    (offer,) = await lease(client)
    assert_refused(await client.post("api/undo", json={"item": offer["item"]}), 409, "undo")


async def test_the_operator_sees_everything(make_site: MakeSite) -> None:
    site = make_site(overlap=Overlap(labels=2), gold=Gold())
    site.add(2, needed=2)
    for name, verdicts in {"anna": ["desirable", "undesirable"], "ben": ["desirable", "unsure"]}.items():
        client = site.client(site.token(name))
        for offer, verdict in zip(sorted(await lease(client, 2), key=lambda o: str(o["item"])), verdicts, strict=True):
            await client.post("api/answer", json={"item": offer["item"], "verdict": verdict, "seconds": 2})
    token = site.token("operator", "operator")
    operator = site.client(token)
    overview = (await operator.get("api/overview")).json()
    assert [(row["name"], row["answers"], row["agreement"]) for row in overview["labelers"]] == [
        ("anna", 2, 0.5),
        ("ben", 2, 0.5),
    ]
    assert overview["agreement"]["percent"] == 0.5
    assert overview["rounds"][0]["desirable"] == 1
    recent = [item for items in overview["recent"].values() for item in items]
    assert len(recent) == 2
    for item in recent:
        assert (await operator.get(f"api/images/{item}.png")).status_code == 200
    page = (await (await site.browser(token)).get("overview")).text
    assert "2 of 2" in page
    assert all(f"overview/{item}.png" in page for item in recent)


async def test_the_operator_excludes_and_includes(site: Site) -> None:
    site.add(1)
    anna, operator = site.client(site.token()), site.client(site.token("operator", "operator"))
    assert (await operator.post("api/labelers/exclude", json={"name": "anna"})).status_code == 204
    assert_refused(await anna.post("api/lease", json={}), 403, "excluded")
    assert (await operator.post("api/labelers/include", json={"name": "anna"})).status_code == 204
    assert len(await lease(anna)) == 1
    for act in ("exclude", "include"):
        reply = await operator.post(f"api/labelers/{act}", json={"name": "zoe"})
        assert_refused(reply, 404, "name")
        assert "anna" in reply.json()["message"]
        assert_refused(await operator.post(f"api/labelers/{act}", json={"name": "a\x00b"}), 422, "request")


async def test_exports_can_be_read(site: Site) -> None:
    site.add(2, prompt='ein "grüner" Ring\n')
    client = site.client(site.token())
    for offer in await lease(client, 2):
        await client.post("api/answer", json={"item": offer["item"], "verdict": "desirable"})
    operator = site.client(site.token("operator", "operator"))
    lines, table = await operator.get("api/export.jsonl"), await operator.get("api/export.parquet")
    rows = [json.loads(line) for line in lines.text.splitlines()]
    assert rows == pq.read_table(io.BytesIO(table.content)).to_pylist()
    assert [(row["labeler"], row["answer"], row["prompt"]) for row in rows] == [
        ("anna", "desirable", 'ein "grüner" Ring\n')
    ] * 2
    assert lines.headers["content-disposition"] == 'attachment; filename="answers.jsonl"'
    assert table.headers["content-disposition"] == 'attachment; filename="answers.parquet"'


async def test_openapi_describes_every_call(site: Site) -> None:
    described = (await site.client(site.token()).get("api/openapi.json")).json()
    calls = {(method.upper(), path) for path, methods in described["paths"].items() for method in methods}
    assert calls == {
        *(("POST", f"/api/{path}") for path in ("lease", "answer", "extend", "release", "undo", "votes")),
        *(("POST", f"/api/labelers/{act}") for act in ("exclude", "include")),
        *(
            ("GET", f"/api/{path}")
            for path in ("progress", "overview", "export.jsonl", "export.parquet", "openapi.json")
        ),
        ("GET", "/api/images/{item}.png"),
    }
    assert described["servers"] == [{"url": PREFIX}]
    assert described["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    for path, methods in described["paths"].items():
        for call in methods.values():
            assert call["description"], path
            assert {"HTTPBearer": []} in call["security"], path
            assert {"401", "403", "422", "429"} <= call["responses"].keys(), path
    for name, schema in described["components"]["schemas"].items():
        assert schema.get("description"), name
    for path in ("docs", "redoc", "openapi.json"):
        assert (await site.client(site.token()).get(path)).status_code == 404


def test_the_page_on_the_api_shows_every_call() -> None:
    text = (Path(__file__).parents[2] / "docs/labeling_api.md").read_text(encoding="utf-8")
    calls = ("lease", "answer", "extend", "release", "undo", "votes", "progress", "overview", "export.jsonl")
    for path in (*calls, "openapi.json"):
        assert f"api/{path}" in text, path
    for why in (*STATUS, "form", "site", "rate", "size", "request", "name"):
        assert f"`{why}`" in text, why


async def test_whoever_is_unknown_to_the_desk_is_a_user_error_there(site: Site) -> None:
    """What the app turns into a 404."""
    with pytest.raises(UserError, match="no labeler 'zoe'"):
        await site.desk.include(site.signer.badge(site.token("operator", "operator")).id, "zoe")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(3, "just now"), (42, "40 s ago"), (125, "2 min ago"), (7300, "2 h ago"), (200000, "2 d ago")],
)
def test_how_long_ago(seconds: float, words: str) -> None:
    assert ago(time.time() - seconds) == words
    assert ago(None) == "never"
