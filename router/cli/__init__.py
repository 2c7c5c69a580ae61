"""The command line: `shoal`."""
