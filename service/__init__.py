"""The server: HTTP, engine, metrics, command line."""
