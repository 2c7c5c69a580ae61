"""The built-in page `GET /dashboard`: spend, carbon, routing, quality, experiments and a chat box.

`page/` is plain HTML, CSS and JavaScript that needs nothing from the network; `figures` is the
ledger's aggregates behind it, `routes` serves both.
"""
