"""Starting Serve on a cluster that other drivers start it on, too, and what is deployed there at the same time."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from ray import serve
from ray.exceptions import ActorAlreadyExistsError, ActorDiedError

from kto_ray import serving
from kto_ray.config.people import Human
from kto_ray.people.web.deployment import page_application


@pytest.mark.parametrize(
    "error", [ActorAlreadyExistsError("Actor with name 'SERVE_CONTROLLER_ACTOR' already exists"), ActorDiedError()]
)
def test_who_comes_second_uses_the_serve_of_the_first(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two drivers that start Serve at once, Ray lets one make the controller and gives the other an error.

    It gives one, too, when a proxy came too slowly and was replaced.
    """
    calls: list[dict[str, Any]] = []

    def start(**options: Any) -> None:
        calls.append(options)
        if len(calls) < 3:
            raise error

    monkeypatch.setattr("ray.serve.start", start)
    monkeypatch.setattr(serving, "POLL_S", 0)
    serving.start_serve(None)
    assert len(calls) == 3


def test_an_error_that_stays_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(**_options: Any) -> None:
        raise ActorAlreadyExistsError("Actor with name 'SERVE_CONTROLLER_ACTOR' already exists")

    monkeypatch.setattr("ray.serve.start", start)
    monkeypatch.setattr(serving, "POLL_S", 0)
    with pytest.raises(ActorAlreadyExistsError):
        serving.start_serve(None)


def test_applications_are_made_while_others_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """For either, Serve makes configurations, and for that it changes what the whole process pickles how."""

    def no_cluster(targets: list[serve.RunTarget], **_: Any) -> list[str]:
        return [str(target.name) for target in targets]

    page = partial(page_application, None, Human(), "secret")
    monkeypatch.setattr(serve, "run_many", no_cluster)
    monkeypatch.setattr(serve, "status", page)  # makes one configuration, as for every deployment that is there
    names = [f"page-{index}" for index in range(150)]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(serving._status) for _ in names]
        assert list(pool.map(lambda name: serving._run(page, name, "/", False), names)) == names
        for one in asked:
            one.result()
