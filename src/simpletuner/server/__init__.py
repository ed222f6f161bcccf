"""The HTTP server: routes over the store and the supervisor."""
