"""A run: its recipe, the folder it is kept in (layout, record), its checkpoints, and going on with it (resuming)."""
