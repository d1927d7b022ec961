"""Ranks: the processes that train together. world.py finds them, rendezvous.py and mesh.py connect them, watch.py tells
of their failures, and a `Comm` (comm.py) is what they exchange values by."""
