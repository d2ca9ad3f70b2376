"""Training data: files within bounds, rows out of files, examples out of rows."""
