"""Labelled images from anywhere: one small file a kind of source, all behind the protocol of `protocol.py`.

`sources.py` makes the source that a configuration's `data:` names. What a source gives are references and bytes as they
are; nothing here decodes an image for training.
"""
