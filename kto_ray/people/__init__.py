"""People as a labeler: a queue that loses nothing, and a page to answer on.

making.py -> labeler.py -> desk.py -> intake.py, queue.py, votes.py -> tables.py (SQLite or PostgreSQL)
                              ^
 browser, JSON clients -> web/app.py (Ray Serve)
"""
