"""`python -m kto_ray` is `kto-ray`, where no script of that name is on the PATH."""

from kto_ray.cli import main

main(prog_name="kto-ray")
