"""The library of adapters: immutable versions on the disk, names that point to them, and the versions in memory.

The entry point is `library`; `records` has the data types, and imports nothing heavy.
"""
