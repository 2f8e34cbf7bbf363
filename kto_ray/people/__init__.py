"""People as a labeler: a queue that loses nothing, and a page to answer on.

loop.py -> labeler.py -> actor.py -> queue.py -> tables.py (SQLite or PostgreSQL)
                             ^
browser, JSON clients -> web/app.py (Ray Serve)
"""
