"""A product as the labeler: images go out under ids, votes come back as rows of a table or to the JSON API.

making.py -> labeler.py -> publishing.py -> a folder or bucket, where the application finds images
                 |
                 +-> sql_votes.py, file_votes.py -> understanding.py     what the application's users said
                 |
                 +-> people/: the queue that people's answers go through, too (people/votes.py)

`checks.py` looks at all of it before a run begins.
"""
