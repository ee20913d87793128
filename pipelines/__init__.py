"""What runs once: Ray Data and Ray Train programs, one module a stage. Each skips what is finished."""
