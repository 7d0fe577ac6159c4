"""What the mesh says about itself: `logs`, `output` (a terminal that may go away), `crash` (unexpected exceptions)."""
