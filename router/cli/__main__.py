"""`python -m router.cli`, the same as `shoal`."""

from router.cli.main import main

if __name__ == "__main__":  # engines may start processes that import this module again
    main()
