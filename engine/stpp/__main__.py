"""`python -m stpp`: the command line, also what torchrun starts."""

from stpp.cli import main

if __name__ == "__main__":
    main()
