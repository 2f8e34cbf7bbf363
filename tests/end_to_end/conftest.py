"""Fixtures of whole runs."""

from collections.abc import Iterator

import pytest

from tests.end_to_end.cluster import shared_ray


@pytest.fixture(scope="module")
def one_ray(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment of the runs of a file, of which each would begin a Ray of its own."""
    with shared_ray(tmp_path_factory.mktemp("ray"), cpus=8) as environment:
        yield environment
