"""Engines: everything that turns prompts into tokens, behind one contract (`base.Engine`)."""
