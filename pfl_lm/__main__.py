"""``python -m pfl_lm`` is ``pfl-lm``."""

from pfl_lm.cli.app import main

if __name__ == "__main__":
    main()
