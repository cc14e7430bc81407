"""The network itself: no files, no planning, no cache policy."""
