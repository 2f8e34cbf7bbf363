"""`kto-ray run` as a file: `python jobs/online_kto.py --recipe shapes_demo`, or the same behind `ray job submit`."""

from kto_ray.cli_run import run

run()
