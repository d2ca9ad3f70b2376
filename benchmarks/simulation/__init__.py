"""The real scheduler and block pool on a made-up device, in made-up time."""
