"""Offline evaluation: `metrics`; `judge` applies them to a router, `report` shows the result."""
