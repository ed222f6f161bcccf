"""One module a resource; each thin over the store and the supervisor."""
