"""What the mesh says about itself: `logs`."""
