"""From files of rows to every client's examples.

``sources`` and ``splits`` need no torch; this file imports nothing, so that they can be used alone.
"""
