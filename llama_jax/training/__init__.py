"""From a config to a trained model: the step, the loop around it, and what it says."""
