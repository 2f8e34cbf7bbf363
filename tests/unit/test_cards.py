"""Replicas of a node, each of which takes a card of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kto_ray.errors import UserError
from kto_ray.generate import cards
from kto_ray.generate.cards import VISIBLE, lock_one, take_card

REPLICA = """
import sys
from pathlib import Path
from kto_ray.generate.cards import lock_one

print(lock_one(["0", "1"], Path(sys.argv[1])), flush=True)
input()
"""


def test_each_replica_has_a_card_until_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", REPLICA, str(tmp_path)]
    replicas = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in "12"]
    taken = []
    for replica in replicas:
        assert replica.stdout
        taken.append(replica.stdout.readline().strip())
    assert sorted(taken) == ["0", "1"]
    with pytest.raises(UserError, match="none of the 2 cards of this node has room for another replica"):
        lock_one(["0", "1"], tmp_path)
    replicas[0].kill()
    replicas[0].communicate()
    assert lock_one(["0", "1"], tmp_path) == taken[0]
    replicas[1].communicate("\n")


def test_what_a_replica_takes_is_all_that_it_sees(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cards.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv(VISIBLE, "4,7")
    take_card("run", 0.75)
    assert os.environ[VISIBLE] == "4"
    monkeypatch.setenv(VISIBLE, "4,7")
    take_card("run", 0.75)
    assert os.environ[VISIBLE] == "7"
    monkeypatch.setenv(VISIBLE, "4,7")
    take_card("another run", 1)
    assert os.environ[VISIBLE] == "4"


def test_small_shares_fill_a_card_only_once_every_card_has_one(tmp_path: Path) -> None:
    assert [lock_one(["0", "1"], tmp_path, 2) for _ in range(4)] == ["0", "1", "0", "1"]
    with pytest.raises(UserError):
        lock_one(["0", "1"], tmp_path, 2)
