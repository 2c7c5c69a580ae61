"""Training of the small models that ship with the repository, from generated tasks alone."""
