"""`nvembed`, also as `python -m nvembed_mcore`; the guard matters, because tokenising spawns processes that import
this."""

import os
import sys
from typing import NoReturn


def run() -> NoReturn:
    """The program."""
    try:
        from nvembed_mcore.cli import end_now, main
    except KeyboardInterrupt:
        sys.stderr.write("nvembed: interrupted\n")
        sys.exit(130)
    status = main()
    if "RANK" in os.environ:
        # A thread that is still inside torch may hold up a rank on the interpreter's way out.
        end_now(status)
    sys.exit(status)


if __name__ == "__main__":
    run()
