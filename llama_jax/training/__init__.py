"""From a config to a trained model: the train step, the loop and its metrics."""
