"""The pages on which runs are watched: rendered here, kept alive by the small scripts in `static/`.

    browser -> the labeling page's guard.py and entrance.py -> pages.py -> WatchedRun

Headers, badges, cookies and what a shut door looks like are those of people's page (`people/web/`); `app.py` puts it
together.
"""
