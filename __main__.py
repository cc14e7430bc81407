"""`python FOLDER COMMAND ...`: the command line from anywhere, also in portable ComfyUI, whose Python ignores the current folder."""

import sys

from magi.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
