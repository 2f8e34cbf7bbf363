"""That a cluster for tests leaves no process behind; what else it does, `end_to_end/test_breathing.py` relies on."""

import subprocess
import sys
import time

import psutil

from tests.fake_cluster import REPOSITORY, lives

KILLED = f"""
import subprocess, sys, time
command = [sys.executable, "-m", "tests.fake_cluster", "bash", "-c", "setsid sleep 1000 & sleep 1000"]
guardian = subprocess.Popen(command, stdin=subprocess.PIPE, cwd={str(REPOSITORY)!r}, start_new_session=True)
print(guardian.pid, flush=True)
time.sleep(1000)
"""
"""A test with a head that has started a process in a session of its own, as Ray does."""


def test_nothing_is_left_of_a_cluster_whose_test_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True) as test:
        assert test.stdout
        guardian = psutil.Process(int(test.stdout.readline()))
        while len(sleeping := [p for p in guardian.children(recursive=True) if p.name() == "sleep"]) < 2:
            time.sleep(0.05)
        assert all(map(lives, sleeping))
        test.kill()
    while any(map(lives, (guardian, *sleeping))):
        time.sleep(0.05)
