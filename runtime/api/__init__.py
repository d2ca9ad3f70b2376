"""The HTTP surface: a Litestar app over an engine service, and the server that runs it."""
