"""``python -m cupyattn``: what the command `cupyattn` does."""

import sys

from cupyattn.command import main

if __name__ == "__main__":
    sys.exit(main())
