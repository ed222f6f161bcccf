"""What the control world remembers: `simpletuner.db` (jobs, leases, settings, outbox) and `events.db` (events)."""
