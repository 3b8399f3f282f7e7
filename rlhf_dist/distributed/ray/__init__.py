"""Ray: session, actors, placement, network. The one place that starts Ray."""
