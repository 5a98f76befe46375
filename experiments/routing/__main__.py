"""`python -m experiments.routing`: the routers compared."""

from experiments.routing.cli import main

if __name__ == "__main__":
    main()
