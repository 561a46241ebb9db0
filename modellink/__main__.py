"""`python -m modellink VERB` is `modellink VERB`."""

import sys

from modellink.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
