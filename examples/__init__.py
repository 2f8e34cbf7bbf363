"""Examples to copy: `my_taste.py` is a scorer, a function as scorer, and a labeler. See docs/plugins.md."""
