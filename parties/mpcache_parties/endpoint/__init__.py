"""Serve this client's private conversations to programs that speak OpenAI's API, and to a browser."""
