"""Which objective gets the most out of a verdict? Methods x tasks x seeds at an equal budget, on any cluster.

    jobs/bake_off.py -> planning.py: cells, those that are done left out
                     -> running.py:  a Ray task a cell: plain_loop.py, the loop without Ray, judged after some rounds
                     -> page.py:     curves and tables, bake_off.html and bake_off.json

`tasks.py` lists what is asked of the embedded world, `methods.py` who takes part and how each was tuned.
"""
