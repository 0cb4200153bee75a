"""Which layers go: strategies that turn scores into a plan."""
