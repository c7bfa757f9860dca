"""`python -m nvembed_mcore`; the guard matters, because saving a checkpoint spawns processes that import this."""

import sys

from nvembed_mcore.cli import main

if __name__ == "__main__":
    sys.exit(main())
