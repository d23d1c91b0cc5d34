"""`python -m kittybuild`."""

from kittybuild.cli import main

if __name__ == "__main__":
    main(prog_name="kittybuild")
