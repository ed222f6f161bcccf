"""Jobs from submit to end: queue, devices, runner, supervisor."""
