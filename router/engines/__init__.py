"""How the router reaches engines: in this process, or as Ray Serve deployments."""
