"""Serves: the Ray Serve application, the OpenAI API, the plan executor and the command line."""
