"""The step loop, the thread that it runs on, and the delivery of its outputs."""
