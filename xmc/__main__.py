"""`python -m xmc`, which is how torchrun starts the command: `torchrun ... -m xmc train ...`."""

from __future__ import annotations

from xmc.cli import main

if __name__ == "__main__":
    main()
