"""Joins a cluster, says every second what of it is free, and ends when all of it is.

Run as a process of its own, with the cluster's address: a process that has joined one cannot join another. Prints a
JSON object a line: `free` and `total` by kind of resource, and the seconds since the program began to watch.
"""

import json
import sys
import time

import ray

KINDS = ("CPU", "GPU")

ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
began = time.monotonic()
while True:
    free, total = ray.available_resources(), ray.cluster_resources()
    found = {"free": [free.get(kind, 0) for kind in KINDS], "total": [total.get(kind, 0) for kind in KINDS]}
    print(json.dumps(found | {"seconds": round(time.monotonic() - began, 1)}), flush=True)
    if found["free"] == found["total"]:
        break
    time.sleep(0.5)
