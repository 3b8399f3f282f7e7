"""Where hosted models live: Ray actors, or this process. The one place that touches Ray."""
