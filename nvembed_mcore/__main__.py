"""`python -m nvembed_mcore`; the guard matters, because tokenising spawns processes that import this."""

import os
import sys

from nvembed_mcore.cli import end_now, main

if __name__ == "__main__":
    status = main()
    if "RANK" in os.environ:
        # A thread that is still inside torch may hold up a rank on the interpreter's way out.
        end_now(status)
    sys.exit(status)
