"""Programs: the only layer that reads the command line and the environment, and that starts processes."""
