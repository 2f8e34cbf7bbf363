"""Python environments of scorers whose packages cannot live beside the loop's.

`contents.py` says what is in them, `repairs.py` mends packages that are broken as they were published, `finding.py` is
how `score/pool.py` gets the interpreter of one, `building.py` builds and `trying.py` tries them (`kto-ray env`). Each
is a *layer*, a virtual environment with a few packages of its own, over one *base* (Ray, torch, torchvision: 6 GB) that
a .pth file puts behind them on sys.path. A layer holds exactly the packages named: the requirements that they state
exclude one another, or ask for what is never imported. docs/environments.md has all reasons.

These modules are imported in the environments, too: they import only what is there.
"""
