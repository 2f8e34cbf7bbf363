"""`kto-ray submit` to a head with token authentication, from a folder that is no checkout."""

import subprocess
import sys
from pathlib import Path

from tests.end_to_end.cluster import running_head


def test_a_recipe_and_its_prompts_are_run_on_the_cluster(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "mine.yaml").write_text("run: submitted\nprompts: {train: colors.txt}\n")
    (mine / "colors.txt").write_text("a red kite\na blue kite\n")
    (mine / "held_out.txt").write_text("a red kite\n")

    with running_head(tmp_path, cpus=1) as head:
        # What `ray get-auth-token` has left in the home directory is enough; nothing says that there is a token.
        env = {name: value for name, value in head.env.items() if not name.startswith("RAY_AUTH")}
        env |= {"HOME": str(tmp_path)}

        def submit(*words: str) -> "subprocess.CompletedProcess[str]":
            command = [sys.executable, "-m", "kto_ray", "submit", "--recipe", "mine.yaml", "--dry-run", *words]
            return subprocess.run(command, cwd=mine, env=env, capture_output=True, text=True, check=False)

        followed = submit("--follow", "rounds=3")
        assert followed.returncode == 0, followed.stdout + followed.stderr
        assert "rounds: 3\n" in followed.stdout
        assert "prompts: 2 for training, 48 held out" in followed.stdout
        assert f"runs_folder: {mine / 'runs'}" in followed.stdout
        assert followed.stdout.rstrip().endswith(": succeeded")

        refused = submit("--follow", "--id", "refused", "prompts.held_out=held_out.txt")
        assert refused.returncode == 2, refused.stdout + refused.stderr
        assert "error: prompts.held_out: 1 of its prompts are trained on, too" in refused.stdout
        assert refused.stdout.rstrip().endswith("refused: failed")

        again = submit("--id", "refused")
        assert again.returncode == 2
        assert "the cluster does not take the job refused: " in again.stderr
