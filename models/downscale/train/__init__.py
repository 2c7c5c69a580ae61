"""Training: of a base from nothing, and of what was cut from one."""
