"""Continued training of NSA models: data, tasks, the differentiable forward, losses and the loop."""
