"""Offline Diffusion-KTO: from labelled images of any source to prepared sets, and runs that train on them.

    data/ (sources)  ->  listing.py  ->  preparing.py  ->  a prepared set (`prepared.py`)  ->  train/streaming.py
                         hash, count     decode, encode                                        the train workers
                         what is bad     with Ray Data                                         stream it

`loop.py` is the whole run; `kto-ray run` and jobs/offline_kto.py start it.
"""
