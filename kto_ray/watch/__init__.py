"""A run one can watch, while it goes on or long after: `kto-ray watch`, or in the run itself: `watch.port`.

    run's folder --> reading.py: what is there now --> evaluate/albums.py: images with their whole story
                         |                                 |
                         |                       finding.py: filters; thumbnails.py: made once
                         v
        curves.py, evaluate/timeline.py, standing.py: figures as pictures and words
                         |
                         v
    web/: pages and pictures --> serving.py: a server of its own; own_page.py: the run's, on Ray Serve

All of it reads, and only reads, what a run keeps in its folder, so that the run does not notice; `web/` alone knows of
requests, and `own_page.py` and `web/deployment.py` of Ray. `door.py` makes the link.
"""
