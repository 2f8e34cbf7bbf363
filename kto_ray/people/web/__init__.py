"""The page on which people judge images, the operator's overview, and the JSON API behind both.

browser, JSON clients -> guard.py -> api.py, pages.py -> desk.py
                                        |
                             entrance.py: who is calling

`app.py` puts it together, `deployment.py` runs it on Ray Serve; `templates/` and `static/` are what browsers get.
"""
