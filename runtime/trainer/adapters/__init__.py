"""The library of adapters: immutable versions on the disk, names that point to them, and which are in memory.

The way in is `library`; `records` are the nouns, and import nothing heavy.
"""
