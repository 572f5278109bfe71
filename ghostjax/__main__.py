"""``python -m ghostjax``."""

import sys

from ghostjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
