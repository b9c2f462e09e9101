"""Files: results and how they are packed, checkpoints of a run, compiled programs."""
