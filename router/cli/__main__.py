"""`python -m router.cli`, the same as `shoal`."""

from router.cli.main import app

app()
