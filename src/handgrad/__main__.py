"""python -m handgrad: the command line, where the script `handgrad` is not on the path."""

import sys

from handgrad.cli.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
