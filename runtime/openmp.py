"""How long torch's threads spin while they wait: a setting of its OpenMP runtime, read when torch is imported.

libgomp spins for some milliseconds before it sleeps, and takes the cores from the C++ ops, which have threads of their
own, and from whoever else computes on this machine. Beside a process that keeps all cores busy every parallel op of
torch then lasts as long as the system lets that one run.
"""

import os

SPINS = "10000"
"""Some tenths of a millisecond: training is as fast as with libgomp's own 300,000; with 2,000 it is 3 % slower."""


def limit_spinning() -> None:
    """Does nothing where the environment says how to wait, nor where torch is imported already."""
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS
