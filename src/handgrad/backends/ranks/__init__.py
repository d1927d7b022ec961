"""Ranks: the processes that train together. startup.py opens the `Comm` (comm.py), by which a rank exchanges values
with the others. launchers.py and processes.py say how ranks were started, rendezvous.py and mesh.py connect them,
watch.py reports their failures."""
