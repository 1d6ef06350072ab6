"""`python -m pyrdiff`, and `accelerate launch -m pyrdiff train ...`: the command line."""

from pyrdiff.cli import main

if __name__ == "__main__":
    main()
