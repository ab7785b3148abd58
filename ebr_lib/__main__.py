"""`python -m ebr_lib`."""

import sys

try:
    from ebr_lib.cli import main

    status = main()
except KeyboardInterrupt:  # while modules are loaded
    sys.stderr.write("interrupted\n")
    status = 130
raise SystemExit(status)
