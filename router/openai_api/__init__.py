"""OpenAI's wire format: what requests may say and what responses look like, apart from serving."""
