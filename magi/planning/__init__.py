"""Memory and time, worked out before anything is loaded."""
