"""`python -m cnmdriver` is `pynet`."""

from cnmdriver.cli.main import main

if __name__ == "__main__":
    main(prog_name="pynet")
