"""`kto-ray plan`: nodes, hours and what will idle, before a cluster is paid for.

    node_types.py   what a cluster can have, from the file that it is begun with
    packing.py      which role's actors go where, as Ray would put them: whole actors, whole cards or parts of one
    speeds.py       what an actor does in a second: as stated, or as a finished run measured it
    plan.py         rounds, hours and idle shares that follow

`cli_plan.py` puts it on the command line. Nothing here needs a cluster or a GPU, and a run asks nothing of it: on the
cluster the run looks at what is there.
"""
