"""``python -m rlzoo``, which `accelerate launch` needs."""

import sys

from rlzoo.cli import main

if __name__ == "__main__":
    sys.exit(main())
