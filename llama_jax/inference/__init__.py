"""Generation: requests, the engine, prefill and decode programs, sampling and scoring."""
