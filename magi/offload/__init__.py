"""Where weights and K/V wait, and how they reach the device in time."""
