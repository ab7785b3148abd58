#!/usr/bin/env python
"""Fine-tune an embedding model with LoRA: `python ebr_finetune.py --help`."""

from ebr_lib.cli import main_finetune

if __name__ == "__main__":
    raise SystemExit(main_finetune())
