"""`python -m ebr_lib`."""

from ebr_lib.cli import main

raise SystemExit(main())
