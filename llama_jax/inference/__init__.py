"""Generation: requests, the engine, prefill and decode loops, sampling and scoring."""
