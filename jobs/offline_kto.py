"""`kto-ray run` on labelled images, as a file: `python jobs/offline_kto.py --recipe paper data=pick_a_pic/*.parquet`.

`kto-ray dataset show` looks at the data first; docs/offline.md says what they may be.
"""

from kto_ray.cli_run import OFFLINE, run

run(default_map={"recipe": "shapes_offline"}, obj=OFFLINE)
