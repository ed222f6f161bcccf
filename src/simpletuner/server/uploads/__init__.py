"""Files that come over HTTP: checked, staged, then put in their place (api.md §2.7)."""
