"""Fixtures of whole runs."""

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, sync_playwright

from tests.browser import DESKTOP, OpenContext, launch
from tests.end_to_end.cluster import shared_ray


@pytest.fixture(scope="module")
def one_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of the runs of a file, of which each would begin a Ray of its own."""
    with shared_ray(tmp_path_factory.mktemp("ray"), cpus=8) as environment:
        yield environment


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def new_context(browser: Browser) -> Iterator[OpenContext]:
    """A session of its own: cookies, storage, window."""
    opened: list[BrowserContext] = []

    def new(**options: Any) -> BrowserContext:
        opened.append(browser.new_context(**{**DESKTOP, **options}))
        opened[-1].set_default_timeout(120_000)  # on a machine where everything takes eight times as long
        return opened[-1]

    yield new
    for context in opened:
        context.close()
