"""The commands of `python -m magi`, one a file, each with `add_arguments(parser)` and `main(args) -> int`."""
