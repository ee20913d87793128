"""What stays alive: Ray actors around plain classes of `sparsight`, and the one place that connects to a cluster."""
