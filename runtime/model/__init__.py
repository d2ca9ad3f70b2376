"""The decoder and its parts. `families/` has one file per architecture, `fallback/` runs transformers' own modules."""
