"""Readers of published benchmarks and of a user's own triplets.

A reader takes the files of a raw directory and a split, and gives its queries and galleries by
image id, see `schema.Annotations`; no image is opened. What each file holds, and what happens with
records that are not sound, is told by the reader's module, whose `RAW` says how it is called.
"""
