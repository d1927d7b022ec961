"""What handgrad keeps on disk: checkpoints."""

from handgrad.io.checkpoint import Writer, complete, load, load_meta, load_state, newest, prune, save

__all__ = ["Writer", "complete", "load", "load_meta", "load_state", "newest", "prune", "save"]
