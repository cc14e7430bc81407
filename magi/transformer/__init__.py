"""The network as mathematics: no file, no plan, no cache policy."""
