"""A machine that dials in to run jobs: the agent launches, a keeper for each job holds its lease."""
