"""`kto-ray export`: a published policy as files that other programs load.

published.py   finds the policy and its model, and proves both
formats.py     what each `--to` writes, and how that is loaded; merging.py for a whole pipeline
card.py        the README.md, with the figures and pictures of the run's own evaluations (evaluated.py)
exporting.py   puts them together, in a folder that is there whole or not at all
pushing.py     to a model hub
"""
