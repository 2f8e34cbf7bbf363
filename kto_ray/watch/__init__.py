"""A run one can watch, while it goes on or long after: `kto-ray watch`.

    run's folder --> reading.py: what is there now --> albums.py: images with their whole story
                         |                                 |
                         |                       finding.py: filters; thumbnails.py: made once
                         v
        curves.py, timeline.py, standing.py: figures as pictures and words
                         |
                         v
    web/: pages and pictures --> serving.py: a server of its own

All of it reads, and only reads, what a run keeps in its folder, so neither Ray nor the run notices; `web/` alone knows
of requests.
"""
