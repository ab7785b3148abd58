#!/usr/bin/env python
"""Fine-tune an embedding model with LoRA: `python ebr_finetune.py --help`."""

import sys

if __name__ == "__main__":
    try:
        from ebr_lib.cli import main_finetune

        status = main_finetune()
    except KeyboardInterrupt:  # while modules are loaded
        sys.stderr.write("interrupted\n")
        status = 130
    raise SystemExit(status)
