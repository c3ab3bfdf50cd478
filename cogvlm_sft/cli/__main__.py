"""`python -m cogvlm_sft.cli`, which launchers start."""

import sys

from cogvlm_sft.cli import main

if __name__ == "__main__":
    sys.exit(main())
